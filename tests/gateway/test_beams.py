"""Beam search over HTTP: what reaches the backend, what is refused and how, what comes back."""

from __future__ import annotations

import asyncio

import pytest
from gateway_fakes import TOOL_TEMPLATE, FakeBackend, call, fake_gateway

from serve.gateway.field import PATHS
from serve.request import BeamParams

BASE = {
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "completions": {"model": "tiny", "prompt": "hi", "max_tokens": 4},
}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}


def ask(endpoint: str, **fields):
    """(answer, the backend's requests)"""

    async def scenario():
        backend = FakeBackend(chat_template=TOOL_TEMPLATE)
        async with fake_gateway(backend) as gateway:
            answer = await call(gateway, PATHS[endpoint], BASE[endpoint] | fields)
        return answer, backend.requests

    return asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize(
    ("fields", "beams", "n"),
    [
        ({"num_beams": 4}, BeamParams(num_beams=4), 1),
        ({"num_beams": 4, "n": 2, "temperature": 0}, BeamParams(num_beams=4), 2),
        ({"use_beam_search": True, "n": 3}, BeamParams(num_beams=3), 3),
        ({"use_beam_search": True, "n": 2, "num_beams": 5}, BeamParams(num_beams=5), 2),
        ({"use_beam_search": True, "length_penalty": 0.5}, BeamParams(num_beams=1, length_penalty=0.5), 1),
        (
            {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5, "early_stopping": "never"},
            BeamParams(num_beams=6, num_beam_groups=3, diversity_penalty=0.5, early_stopping="never"),
            1,
        ),
        ({"num_beams": 2, "early_stopping": True}, BeamParams(num_beams=2, early_stopping=True), 1),
        ({"num_beams": 1, "num_beam_groups": 1, "length_penalty": 1.0}, None, 1),
        ({"use_beam_search": False, "early_stopping": False, "diversity_penalty": 0}, None, 1),
    ],
)
def test_each_way_to_ask_is_one_search(endpoint, fields, beams, n):
    answer, (request,) = ask(endpoint, **fields)
    assert answer.status == 200
    assert (request.sampling.beams, request.n) == (beams, n)


@pytest.mark.parametrize("endpoint", BASE)
@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"num_beams": 0}, "num_beams", "1"),
        ({"num_beams": 65}, "num_beams", "64"),
        ({"use_beam_search": True, "n": 65}, "n", "at most 64 beams"),
        ({"num_beams": 2, "n": 3}, "n", "more than num_beams, which is 2"),
        (
            {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1},
            "num_beam_groups",
            "does not divide num_beams",
        ),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty", "at least 2 groups and a penalty above 0"),
        ({"num_beams": 4, "diversity_penalty": 1}, "diversity_penalty", "at least 2 groups"),
        ({"num_beams": 4, "length_penalty": 5}, "length_penalty", "4"),
        ({"num_beams": 4, "early_stopping": "always"}, "early_stopping", "never"),
        ({"num_beams": 4, "temperature": 0.7}, "temperature", "leave it out or send 0"),
        ({"num_beams": 4, "top_p": 0.9}, "top_p", "leave it out"),
        ({"num_beams": 4, "top_k": 5}, "top_k", "leave it out"),
        ({"num_beams": 4, "min_p": 0.1}, "min_p", "leave it out"),
        ({"num_beams": 4, "stop": ["x"]}, "stop", "use stop_token_ids"),
        ({"num_beams": 4, "use_beam_search": False}, "use_beam_search", "leave one out"),
        ({"num_beam_groups": 2}, "num_beam_groups", "send num_beams above 1"),
        ({"diversity_penalty": 0.5}, "diversity_penalty", "send num_beams above 1"),
        ({"num_beams": 1, "length_penalty": 2}, "length_penalty", "send num_beams above 1"),
        ({"early_stopping": True}, "early_stopping", "send num_beams above 1"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1, "repetition_penalty": 1.2},
            "repetition_penalty",
            "cannot be combined with num_beam_groups",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(endpoint, fields, param, says):
    answer, requests = ask(endpoint, **fields)
    assert answer.status == 400 and not requests
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        ("chat", {"logprobs": True, "top_logprobs": 2}, "logprobs"),
        ("chat", {"logprobs": True, "frequency_penalty": 1}, "logprobs"),
        ("completions", {"logprobs": 1}, "logprobs"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("chat", {**TOOLS, "parallel_tool_calls": False, "n": 2}, "n"),
    ],
)
def test_what_beams_cannot_do_is_refused_by_name(endpoint, fields, param):
    answer, requests = ask(endpoint, num_beams=4, **fields)
    assert answer.status == 400 and not requests
    assert answer.json()["error"]["param"] == param
