"""The field table is complete, true, and what the endpoints do."""

from __future__ import annotations

import asyncio
import json
import typing

import pytest
from gateway_fakes import TOOL_TEMPLATE, FakeBackend, call, fake_gateway
from gateway_image_fakes import FakeImageBackend
from openai.types import completion_create_params, image_generate_params
from openai.types.chat import completion_create_params as chat_create_params

from serve.gateway.field import PATHS, Use
from serve.gateway.fields import FIELDS

TEXT = ("chat", "completions")
BASE = {
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "completions": {"model": "tiny", "prompt": "hi", "max_tokens": 4},
    "images": {"model": "painter", "prompt": "a red circle"},
}
BEAMS = {"num_beams": 4}
NEEDS = {
    "num_beam_groups": BEAMS | {"diversity_penalty": 0.5},
    "diversity_penalty": BEAMS | {"num_beam_groups": 2},
    "length_penalty": BEAMS,
    "early_stopping": BEAMS,
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "continue_final_message": {"messages": [{"role": "assistant", "content": "hi"}]},
    "model": {},
    "width": {"height": 64},
    "height": {"width": 64},
    "output_compression": {"output_format": "jpeg"},
    "partial_images": {"stream": True},
    "stream_progress": {"stream": True},
    "tool_choice": {"tools": FIELDS["chat"]["tools"].example},
    "parallel_tool_calls": {"tools": FIELDS["chat"]["tools"].example},
}


def post_all(endpoint: str, bodies: list[dict]):
    async def scenario():
        async with fake_gateway(FakeBackend(chat_template=TOOL_TEMPLATE), FakeImageBackend()) as gateway:
            return [await call(gateway, PATHS[endpoint], body) for body in bodies]

    return asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("endpoint", "params"),
    [
        ("chat", chat_create_params.CompletionCreateParamsStreaming),
        ("completions", completion_create_params.CompletionCreateParamsStreaming),
        ("images", image_generate_params.ImageGenerateParamsStreaming),
    ],
)
def test_every_field_of_openais_client_is_in_the_table(endpoint, params):
    known = set(typing.get_type_hints(params, include_extras=True))
    assert known - FIELDS[endpoint].keys() == set()
    ours = {name for name, entry in FIELDS[endpoint].items() if entry.origin == "openai"}
    assert ours - known == set(), "marked as OpenAI's, but its client does not know them"


def test_every_field_has_a_note_and_what_its_use_needs():
    for table in FIELDS.values():
        for entry in table.values():
            assert entry.note
            if entry.use is Use.REFUSED:
                assert entry.type is None
            else:
                assert entry.type is not None and entry.example is not None


@pytest.mark.parametrize("endpoint", PATHS)
def test_examples_are_taken(endpoint):
    names = [name for name, entry in FIELDS[endpoint].items() if entry.use is not Use.REFUSED and name != "model"]
    bodies = [{**BASE[endpoint], **NEEDS.get(name, {}), name: FIELDS[endpoint][name].example} for name in names]
    for name, reply in zip(names, post_all(endpoint, bodies), strict=True):
        assert reply.status == 200, (name, reply.body)


@pytest.mark.parametrize("endpoint", PATHS)
def test_null_is_the_same_as_leaving_out(endpoint):
    required = {"messages", "prompt"}
    names = [name for name in FIELDS[endpoint] if name not in required]
    for name, reply in zip(names, post_all(endpoint, [{**BASE[endpoint], name: None} for name in names]), strict=True):
        assert reply.status == 200, (name, reply.body)


@pytest.mark.parametrize("endpoint", PATHS)
def test_refused_fields_are_refused_with_their_reason_and_harmless_values_taken(endpoint):
    refused = [entry for entry in FIELDS[endpoint].values() if entry.use is Use.REFUSED]
    for entry, reply in zip(
        refused, post_all(endpoint, [{**BASE[endpoint], entry.name: {"x": 1}} for entry in refused]), strict=True
    ):
        error = reply.json()["error"]
        assert reply.status == 400 and error["param"] == entry.name and entry.note in error["message"]
    harmless = [(entry.name, value) for entry in refused for value in entry.harmless]
    for (name, value), reply in zip(
        harmless, post_all(endpoint, [{**BASE[endpoint], name: value} for name, value in harmless]), strict=True
    ):
        assert reply.status == 200, (name, value, reply.body)


@pytest.mark.parametrize("endpoint", TEXT)
def test_honoured_sampling_fields_reach_the_backend(endpoint):
    sent = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "seed": 99, "stop_token_ids": [5, 6],
        "logit_bias": {"3": -1, "4": 2.5}, "priority": -3, "timeout": 12.5,
    }  # fmt: skip
    backend = FakeBackend()

    async def scenario():
        async with fake_gateway(backend) as gateway:
            assert (await call(gateway, PATHS[endpoint], {**BASE[endpoint], **sent})).status == 200

    asyncio.run(scenario())
    [request] = backend.requests
    sampling = request.sampling
    plain = {name: sent[name] for name in list(sent)[:10]}
    assert {name: getattr(sampling, name) for name in plain} == plain
    assert sampling.stop_token_ids == (5, 6) and sampling.logit_bias == ((3, -1.0), (4, 2.5))
    assert request.priority == 3, "larger is earlier inside, smaller is earlier in vLLM's API"
    assert request.timeout_s == 12.5


def test_fields_of_the_other_endpoint_are_refused_with_its_path():
    [reply] = post_all("chat", [{**BASE["chat"], "prompt": "x"}])
    assert reply.status == 400 and "/v1/completions" in reply.json()["error"]["message"]
    [reply] = post_all("completions", [{**BASE["completions"], "messages": []}])
    assert reply.status == 400 and "/v1/chat/completions" in reply.json()["error"]["message"]
    [reply] = post_all("chat", [{**BASE["chat"], "size": "64x64"}])
    assert reply.status == 400 and "/v1/images/generations" in reply.json()["error"]["message"]


def test_unknown_fields_are_refused_by_name_with_the_nearest_one():
    [reply] = post_all("chat", [{**BASE["chat"], "max_token": 3}])
    error = reply.json()["error"]
    assert reply.status == 400 and error["param"] == "max_token" and "'max_tokens'" in error["message"]


def test_docs_show_every_field():
    async def scenario():
        async with fake_gateway() as gateway:
            page = (await call(gateway, "/docs")).body.decode()
            schemas = (await call(gateway, "/openapi.json")).json()["components"]["schemas"]
            return page, schemas

    page, schemas = asyncio.run(scenario())
    for endpoint, table in FIELDS.items():
        for name in table:
            assert f"<code>{name}</code>" in page, (endpoint, name)
    for endpoint, name in (("chat", "ChatCompletionRequest"), ("images", "ImageGenerationRequest")):
        known = {name for name, entry in FIELDS[endpoint].items() if entry.use is not Use.REFUSED}
        assert set(schemas[name]["properties"]) == known
    assert "http://" not in page and "https://" not in page and "<script" not in page


LM_EVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "</s>"]
CLIENT_BODIES = [
    # vllm bench serve, backends openai and openai-chat (vllm/benchmarks/lib/endpoint_request_func.py)
    ("completions", {"model": "tiny", "prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None,
                     "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}),
    ("completions", {"model": "tiny", "prompt": "hi", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": 5,
                     "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0, "top_p": 1.0,
                     "top_k": -1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}),
    ("chat", {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
              "max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True},
              "ignore_eos": True, "temperature": 0.0}),
    # guidellm 0.8 (guidellm/backends/openai/request_handlers.py)
    ("completions", {"model": "tiny", "stream": True, "prompt": "hi", "max_tokens": 8, "stop": None,
                     "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True}),
    ("chat", {"model": "tiny", "stream": True, "stop": None, "ignore_eos": True, "max_completion_tokens": 8,
              "stream_options": {"include_usage": True, "continuous_usage_stats": True},
              "messages": [{"role": "system", "content": "x"},
                           {"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
    ("chat", {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                                            {"role": "assistant", "content": "a"},
                                            {"role": "user", "content": [{"type": "text", "text": "b"}]}]}),
    # lm-eval 0.4.13 local-completions and local-chat-completions (lm_eval/models/openai_completions.py)
    ("completions", {"model": "tiny", "prompt": [[72, 73, 74], [75, 76]], "temperature": 0, "max_tokens": 1,
                     "logprobs": 1, "seed": 1234, "echo": True}),
    ("completions", {"prompt": [[72, 73]], "model": "tiny", "max_tokens": 8, "temperature": 0, "stop": LM_EVAL_STOPS,
                     "seed": 1234}),
    ("completions", {"prompt": ["hi"], "model": "tiny", "max_tokens": 8, "temperature": 0.8, "stop": [], "seed": 1234,
                     "top_p": 0.95}),
    ("chat", {"messages": [{"role": "user", "content": "hi"}], "model": "tiny", "max_tokens": 8, "temperature": 0,
              "stop": ["\n\n", "</s>"], "seed": 1234}),
    # openai: an answer's message sent back as it came, with what its model dumps
    ("chat", {"model": "tiny", "messages": [{"role": "user", "content": "hi"},
                                            {"role": "assistant", "content": "x", "refusal": None, "annotations": [],
                                             "audio": None, "function_call": None, "tool_calls": None},
                                            {"role": "developer", "content": "y"}, {"role": "user", "content": "z"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "body"), CLIENT_BODIES, ids=lambda value: None)
def test_bodies_of_known_clients_pass_unmodified(endpoint, body):
    [reply] = post_all(endpoint, [body])
    assert reply.status == 200, reply.body
    if body.get("stream"):
        assert reply.data()[-1] == "[DONE]"
        usage = reply.chunks()[-1]["usage"]
        assert reply.chunks()[-1]["choices"] == [] and usage["completion_tokens"] == 8


def test_lm_evals_reading_of_logprobs_holds():
    """As `LocalCompletionsAPI.parse_logprobs` computes a loglikelihood from the answer."""
    prompts, contexts = [[72, 73, 74, 75], [75, 76, 77]], [2, 1]
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    [reply] = post_all("completions", [body])
    for choice, prompt, start in zip(reply.json()["choices"], prompts, contexts, strict=True):
        values = choice["logprobs"]["token_logprobs"][start:-1]
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        assert len(values) == len(prompt) - start
        assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def test_the_table_is_plain_json():
    for table in FIELDS.values():
        for entry in table.values():
            json.dumps([entry.example, entry.harmless], allow_nan=False)
