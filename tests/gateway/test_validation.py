"""What no request gets through with: broken JSON, wrong types, numbers and lists without bound, random bodies."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from gateway_fakes import FakeBackend, call, fake_gateway
from gateway_image_fakes import FakeImageBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.gateway import schemas
from serve.gateway.fields import FIELDS

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
SECRET = "the prompt is secret"
GOOD = {CHAT: {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}, COMPLETIONS: {"prompt": SECRET}}
GOOD[IMAGES] = {"prompt": SECRET}


def post(path: str, body, headers=None):
    async def scenario():
        async with fake_gateway(FakeBackend(), FakeImageBackend()) as gateway:
            return await call(gateway, path, body, headers=headers or {})

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def check_refusal(reply) -> dict:
    """A 4xx in OpenAI's shape that gives nothing away."""
    error = reply.json()["error"]
    assert 400 <= reply.status < 500 and set(error) == {"message", "type", "param", "code"}
    text = reply.body.decode()
    assert SECRET not in text and "Traceback" not in text and "/serve/" not in text
    assert not re.search(r"0x[0-9a-f]{6,}|<[a-zA-Z_.]+ object", text)
    assert len(reply.body) < 2000
    return error


def raw(fields: str) -> bytes:
    return b'{"prompt": "%s", %s}' % (SECRET.encode(), fields.encode())


BAD_JSON = {
    "nothing": b"",
    "no object": b"[1]",
    "text": b"hello",
    "half": b'{"prompt": "a"',
    "NaN": raw('"temperature": NaN'),
    "Infinity": raw('"temperature": Infinity'),
    "-Infinity": raw('"top_p": -Infinity'),
    "1e400": raw('"temperature": 1e400'),
    "digits": raw('"seed": ' + "9" * 5000),
    "twice": raw('"seed": 1, "seed": 2'),
    "twice inside": raw('"stream_options": {"include_usage": true, "include_usage": false}'),
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "deep and closed": b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "surrogate": raw('"user": "\\ud800"'),
    "surrogate key": raw('"\\udfff": 1'),
    "bad utf-8": b'{"prompt": "\xff\xfe"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + b'{"prompt": "a"}',
    "comment": b'{"prompt": "a" /* b */}',
    "trailing": b'{"prompt": "a"} {}',
    "control character": b'{"prompt": "a\x01"}',
}


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, IMAGES, "/tokenize", "/detokenize"])
def test_broken_json_is_400(path, name):
    check_refusal(post(path, BAD_JSON[name]))


BAD_VALUES = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True), ("temperature", [1]),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -1), ("repetition_penalty", 0),
    ("presence_penalty", 3), ("frequency_penalty", -3), ("n", 0), ("n", 129), ("n", 10**9), ("n", "2"), ("n", True),
    ("max_tokens", -1), ("max_tokens", "5"), ("max_tokens", 5.5), ("max_tokens", 10**30), ("max_tokens", True),
    ("min_tokens", -1), ("min_tokens", 10), ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", 1.0), ("seed", "1"),
    ("stop", ""), ("stop", [""]), ("stop", ["x" * 129]), ("stop", ["x"] * 17), ("stop", 5), ("stop", [["x"]]),
    ("stop_token_ids", [-1]), ("stop_token_ids", [10**6]), ("stop_token_ids", [1] * 129), ("stop_token_ids", ["1"]),
    ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1": True}),
    ("logit_bias", {"999999": 1}), ("logit_bias", {str(i): 1 for i in range(1025)}), ("logit_bias", [1]),
    ("logit_bias", {"1": 1, "01": 2}), ("prompt_logprobs", 21), ("stream", "true"), ("stream", 1), ("echo", 1),
    ("stream_options", {"include_usage": True}), ("stream_options", {"other": 1}), ("user", 5), ("user", "x" * 1025),
    ("priority", 10**6), ("cache_salt", ""), ("cache_salt", "x" * 1025), ("request_id", "a b"), ("request_id", ""),
    ("timeout", 0), ("timeout", -1), ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("model", 5),
    ("truncation_side", "middle"), ("model", ""), ("best_of", 2), ("temperature", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_values_out_of_range_or_of_another_type_are_400(path, name, value):
    error = check_refusal(post(path, {**GOOD[path], "max_tokens": 4, name: value}))
    assert name in error["message"] or (error["param"] or "").startswith(name)


BAD_IMAGE_VALUES = [
    ("prompt", ""), ("prompt", None), ("prompt", 5), ("prompt", ["a"]), ("prompt", [1, 2]), ("prompt", "x" * 32001),
    ("prompt", SECRET * 50_000), ("negative_prompt", "x" * 32001), ("negative_prompt", 1), ("n", 0), ("n", 11),
    ("n", 10**9), ("n", -1), ("n", "2"), ("n", True), ("n", 1.0), ("size", "0x0"), ("size", "64x"), ("size", "x64"),
    ("size", "64"), ("size", "1e9x1"), ("size", "٦٤x٦٤"), ("size", "６４x６４"), ("size", "064x64"), ("size", "-64x64"),
    ("size", "64X64"), ("size", "64x64\n"), ("size", " 64x64"), ("size", "64x64x64"), ("size", "9" * 5000 + "x1"),
    ("size", "100000x1"), ("size", 64), ("size", [64, 64]), ("size", "AUTO"), ("size", ""), ("size", SECRET),
    ("width", 0), ("width", -8), ("width", 10**9), ("width", "64"), ("width", 64.0), ("height", True),
    ("num_inference_steps", 0), ("num_inference_steps", 10**9), ("num_inference_steps", "4"),
    ("num_inference_steps", 4.5), ("guidance_scale", -0.1), ("guidance_scale", 101), ("guidance_scale", "3"),
    ("guidance_scale", True), ("seed", -1), ("seed", 2**63), ("seed", 1.5), ("seed", "1"), ("scheduler", ""),
    ("scheduler", "x" * 65), ("scheduler", 3), ("output_format", "gif"), ("output_format", "PNG"),
    ("output_format", SECRET), ("output_compression", -1), ("output_compression", 101), ("response_format", "url"),
    ("response_format", {"type": "b64_json"}), ("response_format", SECRET), ("stream", "true"), ("stream", 1),
    ("partial_images", 9), ("partial_images", -1), ("partial_images", "1"), ("stream_progress", 1), ("priority", 10**6),
    ("timeout", 0), ("timeout", 10**6), ("request_id", "a b"), ("model", 5), ("user", "x" * 1025), ("quality", "high"),
    ("background", "transparent"), ("style", "vivid"), ("moderation", "none"), ("svg", {"model": "x"}),
    ("true_cfg_scale", 4), ("lora", [{"path": "/etc"}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_IMAGE_VALUES, ids=lambda value: str(value)[:20])
def test_image_values_out_of_range_or_of_another_type_are_400(name, value):
    error = check_refusal(post(IMAGES, {**GOOD[IMAGES], name: value}))
    assert error["param"] == name and name in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000])
def test_numbers_that_are_none_are_400_for_images(number):
    check_refusal(post(IMAGES, raw(f'"guidance_scale": {number}')))


BAD_MESSAGES = [
    [], {}, "hi", [1], [{}], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": SECRET}],
    [{"role": "tool", "content": SECRET, "tool_call_id": "1"}], [{"role": SECRET, "content": "a"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
    [{"role": "user", "content": [{"type": "input_audio"}]}], [{"role": "user", "content": [SECRET]}],
    [{"role": "user", "content": [{"type": "text", "text": SECRET}] * 257}], [{"role": "user", "content": "a", "x": 1}],
    [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}], [{"role": "user", "content": "a"}] * 1025,
    [{"role": "user", "content": SECRET * 1000}],
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=lambda value: str(value)[:30])
def test_bad_messages_are_400_and_never_quoted(messages):
    check_refusal(post(CHAT, {"messages": messages}))


BAD_PROMPTS = [
    "", [], [[]], [1, "a"], ["a", [1]], [[1], "a"], [-1], [10**6], [True], [1.5], {}, None, 5, ["a"] * 257, [[1]] * 257,
    [None], [[1, None]], [2**40], SECRET * 1000, [1] * 300,
]  # fmt: skip


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda value: str(value)[:20])
def test_bad_prompts_are_400_and_never_quoted(prompt):
    check_refusal(post(COMPLETIONS, {"prompt": prompt}))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": []}, {"tools": []}, {"tokenize": False}, {"chat_template": "{{ 1 }}"}, {"eos_token": "x"},
        {"add_generation_prompt": False}, {"a": [1]}, {"a": {"b": 1}}, {"_x": 1}, {"a b": 1}, {"a": "x" * 5000},
        {f"a{i}": 1 for i in range(33)}, {"raise_exception": 1},
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_template_variables_of_the_server_cannot_be_set(kwargs):
    check_refusal(post(CHAT, {**GOOD[CHAT], "chat_template_kwargs": kwargs}))


def test_choices_are_bounded_over_all_prompts():
    check_refusal(post(COMPLETIONS, {"prompt": ["a"] * 200, "n": 2}))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/jsonx"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-length": "1000000000"}, 413),
        ({"content-length": "-5"}, 400),
        ({"content-type": 'application/json; charset="UTF-8"'}, 200),
    ],
)
def test_bodies_are_plain_json_of_bounded_size(headers, status):
    reply = post(COMPLETIONS, {"prompt": "a"}, headers)
    assert reply.status == status
    if status == 413:
        assert reply.headers["connection"] == "close"


def test_body_above_the_limit_is_413():
    async def scenario():
        async with fake_gateway(max_body_bytes=2048) as gateway:
            return await call(gateway, COMPLETIONS, {"prompt": "a" * 3000})

    assert asyncio.run(scenario()).status == 413


NAMES = sorted({*FIELDS["chat"], *FIELDS["completions"], *FIELDS["images"], "x", "message", "__class__"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=6)


def test_random_bodies_are_answered_without_a_server_error():
    """400 random bodies on every JSON route: 200 or a 4xx in our shape, and the gateway still serves."""

    async def scenario():
        async with fake_gateway(FakeBackend(), FakeImageBackend()) as gateway:
            loop = asyncio.get_running_loop()

            async def post_all(body, valid):
                for path in (CHAT, COMPLETIONS, IMAGES, "/tokenize", "/detokenize"):
                    sent = {**GOOD.get(path, {}), **body} if valid else body
                    reply = await call(gateway, path, json.dumps(sent).encode("utf-8", "surrogatepass"))
                    assert reply.status == 200 or 400 <= reply.status < 500, (path, sent, reply.body)
                    assert reply.status == 200 or set(reply.json()) == {"error"}

            @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(body=BODIES, valid=st.booleans())
            def fuzz(body, valid):
                asyncio.run_coroutine_threadsafe(post_all(body, valid), loop).result(30)

            await asyncio.to_thread(fuzz)
            assert (await call(gateway, CHAT, GOOD[CHAT])).status == 200
            assert not gateway.backend.open

    asyncio.run(scenario())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_random_bytes_are_refused_or_parsed(data):
    parsers = (schemas.parse_chat, schemas.parse_completion, schemas.parse_image)
    for parse in (*parsers, schemas.parse_tokenize, schemas.parse_detokenize):
        try:
            parse(data)
        except InvalidRequest as refused:
            assert refused.message


def test_control_characters_in_names_cannot_forge_log_lines():
    name = "x\r\nrequest id=forged\x1b[31m"
    error = check_refusal(post(CHAT, {**GOOD[CHAT], name: 1}))
    assert "forged" not in json.dumps(error)


def test_backend_never_sees_a_refused_request():
    text, image = FakeBackend(), FakeImageBackend()

    async def scenario():
        async with fake_gateway(text, image) as gateway:
            for name, value in BAD_VALUES:
                await call(gateway, COMPLETIONS, {"prompt": "a", "max_tokens": 4, name: value})
            for name, value in BAD_IMAGE_VALUES:
                await call(gateway, IMAGES, {"prompt": "a", name: value})

    asyncio.run(scenario())
    assert text.requests == [] and image.requests == []
