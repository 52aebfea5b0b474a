"""Structured output as a user of OpenAI's client sees it: parsed models, streams, hostile schemas beside good ones."""

from __future__ import annotations

import asyncio
import json
from enum import StrEnum
from pathlib import Path

import openai
import pydantic
import pytest
from serving import serving

from models.embedded.paths import EMBEDDED

ASK = [{"role": "user", "content": "What is 12 + 30?"}]


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


class Part(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=12)
    colour: Colour
    sizes: list[int] = pydantic.Field(max_length=3)


class Order(pydantic.BaseModel, extra="forbid"):
    """The client sends it strict: every property required, none besides."""

    title: str = pydantic.Field(max_length=12)
    parts: list[Part] = pydantic.Field(min_length=1, max_length=2)
    note: str | None = pydantic.Field(max_length=8)
    weight: float
    is_urgent: bool


@pytest.fixture(scope="module")
def server():
    if not (Path(EMBEDDED["tandem-text"]) / "model.safetensors").exists():
        pytest.skip("the embedded model is not here")
    with serving("tandem-text", "--no-ray", "--threads", "1") as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_client_parses_a_pydantic_model(client, temperature):
    answer = client.chat.completions.parse(
        model="tandem-text", messages=ASK, response_format=Order, temperature=temperature, seed=3, max_tokens=400
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Order)


def test_a_stream_carries_the_same_json(client):
    schema = {"name": "order", "schema": Order.model_json_schema(), "strict": True}
    params = {
        "model": "tandem-text", "messages": ASK, "temperature": 1.0, "seed": 5, "max_tokens": 400,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }  # fmt: skip
    whole = client.chat.completions.create(**params)
    chunks = list(client.chat.completions.create(**params, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3
    Order.model_validate_json("".join(pieces))


def test_several_choices_are_each_valid(client):
    answer = client.chat.completions.create(
        model="tandem-text", messages=ASK, n=4, temperature=1.5, seed=1, max_tokens=300, logprobs=True, top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": Part.model_json_schema()}},
    )  # fmt: skip
    for choice in answer.choices:
        Part.model_validate_json(choice.message.content or "")
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_what_vllm_calls_structured_outputs(client):
    def complete(**constraint) -> str:
        answer = client.completions.create(
            model="tandem-text", prompt="The answer is", max_tokens=100, temperature=1.0, seed=2,
            extra_body={"structured_outputs": constraint},
        )  # fmt: skip
        return answer.choices[0].text

    assert complete(choice=["yes", "no"]) in ("yes", "no")
    assert complete(regex="[0-9]{3}-[a-f]{2}")[3] == "-"
    assert set(complete(grammar='root ::= ("ab" | "cd"){4}')) <= set("abcd")
    assert " " not in complete(json=Part.model_json_schema(), disable_any_whitespace=True).split('"colour"')[1]


def test_max_tokens_cuts_the_json_and_says_so(client):
    answer = client.chat.completions.create(
        model="tandem-text", messages=ASK, max_tokens=5, response_format={"type": "json_object"}
    )
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.choices[0].message.content or "")


def test_a_bad_schema_is_a_400_that_names_the_field_and_what_is_wrong(client):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tandem-text", messages=ASK, stream=stream,
                response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            )  # fmt: skip
        assert caught.value.param == "response_format" and "uniqueItems" in caught.value.message


def test_hostile_schemas_harm_no_neighbour(server, client):
    """Each costs the process that compiles it its life, while others are served."""
    pid = server.children("replica")[0].pid
    plain = {"model": "tandem-text", "messages": ASK, "temperature": 0}
    expected = client.chat.completions.create(**plain).choices[0].message.content

    async def scenario() -> tuple[list, list]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
            hostile = [
                asking.chat.completions.create(
                    **plain, extra_body={"structured_outputs": {"json": {"type": "integer", "multipleOf": 1234567 + i}}}
                )
                for i in range(4)
            ]
            good = [asking.chat.completions.create(**plain) for _ in range(8)]
            good.append(asking.chat.completions.create(**plain, extra_body={"structured_outputs": {"choice": ["ok"]}}))
            bad = asyncio.gather(*hostile, return_exceptions=True)
            return list(await bad), list(await asyncio.gather(*good))

    refused, good = asyncio.run(scenario())
    assert all(isinstance(error, openai.BadRequestError) for error in refused), refused
    *plainly, constrained = [answer.choices[0].message.content for answer in good]
    assert set(plainly) == {expected} and constrained == "ok"
    assert server.children("replica")[0].pid == pid
