"""A request interrupted at any token and continued by another engine gives what one engine gives, real model and all.

The two engines share nothing. Float32: tokens are equal; log-probabilities agree to 1e-4, for a prompt computed in one
piece rounds its sums otherwise than token by token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_folder

from serve.errors import InvalidRequest
from serve.events import Event, Finished, FinishReason, PromptScored, TokenDelta, TokenLogprobs
from serve.gateway.delivered import DeliveredText
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import BeamParams, Grammar, SamplingParams, TextRequest
from serve.text.backend import TextBackend
from serve.text.build import build_text

torch.set_num_threads(1)
NUM_OUTPUT = 20
PROMPT = (7, 30, 2, 99, 41, 41, 8, 5, 7, 30, 2)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded sampling": {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
    "penalties": {
        "temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "logprobs": 0,
    },
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": ((17, 2.0),)},
    "length limits": {
        "temperature": 1.0, "min_tokens": 12, "stop_token_ids": tuple(range(0, 260, 3)), "logprobs": 1,
    },
    "end token": {"temperature": 1.0, "ignore_eos": False, "stop_token_ids": tuple(range(0, 260, 7)), "logprobs": 1},
    "grammar": {
        "temperature": 1.0, "ignore_eos": False, "max_tokens": 60,
        "grammar": Grammar(kind="json_schema", source=json.dumps(SCHEMA), is_compact=True),
    },
    "regex": {"temperature": 1.0, "ignore_eos": False, "grammar": Grammar(kind="regex", source="(ab|c[0-9]){4}")},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3")


def backend(folder: Path, **values: Any) -> TextBackend:
    options = ModelOptions(
        model=str(folder), threads=1, block_size=8, dtype="float32", max_num_seqs=32,
        kv_cache_memory_bytes=400 * 2 * 2 * 8 * 2 * 32 * 4, **values,
    )  # fmt: skip
    return build_text(options, progress=False)


@pytest.fixture(scope="module")
def first(folder) -> Iterator[TextBackend]:
    yield (made := backend(folder))
    asyncio.run(made.aclose())


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 40},
        {"speculative_config": SpeculativeOptions(method="ngram", prompt_lookup_min=1, num_speculative_tokens=3)},
    ],
    ids=["alike", "small chunks, no cache", "speculating"],
)
def second(folder, request) -> Iterator[TextBackend]:
    yield (made := backend(folder, **request.param))
    asyncio.run(made.aclose())


def asked(n: int = 1, prompt_logprobs: int | None = None, **sampling: Any) -> TextRequest:
    params = SamplingParams(**{"max_tokens": NUM_OUTPUT, "ignore_eos": True, "seed": 11, **sampling})
    return TextRequest(
        request_id="r", model="tiny", prompt_token_ids=PROMPT, sampling=params, n=n, prompt_logprobs=prompt_logprobs
    )


async def read(backend: TextBackend, request: TextRequest) -> list[Event]:
    return [event async for events in await backend.submit(request) for event in events]


def one_by_one(events: list[Event]) -> list[Event]:
    """Deltas of one token each: every place at which a connection may end."""
    single: list[Event] = []
    for event in events:
        if not isinstance(event, TokenDelta):
            single.append(event)
            continue
        for i, token_id in enumerate(event.token_ids):
            logprobs = None if event.logprobs is None else (event.logprobs[i],)
            single.append(TokenDelta(event.index, (token_id,), logprobs, event.num_cached if i == 0 else None))
    return single


def summary(events: list[Event], n: int) -> list[Any]:
    """Per choice what a client can tell, without log-probabilities; speculation's own figures are nobody's promise."""
    choices = []
    for index in range(n):
        tokens = [t for e in events if isinstance(e, TokenDelta) and e.index == index for t in e.token_ids]
        (end,) = (e for e in events if isinstance(e, Finished) and e.index == index)
        usage = replace(end.usage, cached_tokens=0, accepted_tokens=0, rejected_tokens=0)
        choices.append((tokens, end.reason, usage, end.stop_token_id))
    return choices


def logprobs(events: list[Event], n: int) -> list[TokenLogprobs | None]:
    found: list[TokenLogprobs | None] = []
    for index in range(n):
        found += [s for e in events if isinstance(e, TokenDelta) and e.index == index for s in e.logprobs or ()]
        found += [e.stop_logprobs for e in events if isinstance(e, Finished) and e.index == index]
    return found + [s for e in events if isinstance(e, PromptScored) for s in e.logprobs]


def assert_close(some: list[TokenLogprobs | None], others: list[TokenLogprobs | None]) -> None:
    assert [s and (s.token_id, s.rank, [t for t, _ in s.top]) for s in some] == [
        s and (s.token_id, s.rank, [t for t, _ in s.top]) for s in others
    ]
    values = ([v for s in each if s for v in (s.logprob, *(w for _, w in s.top))] for each in (some, others))
    assert next(values) == pytest.approx(next(values), abs=1e-4)


async def interrupted(events: list[Event], cut: int, request: TextRequest, second: TextBackend) -> list[Event]:
    """The first `cut` events of one engine, and what a gateway makes of the other's."""
    seen = DeliveredText(request, second.card)
    got = seen.take(events[:cut])
    return got if seen.is_complete else got + seen.take(await read(second, seen.rest()))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_interrupted_at_any_token_the_answer_is_the_same(first, second, case, n):
    request = asked(n, prompt_logprobs=1 if case == "seeded sampling" else None, **CASES[case])

    async def test() -> None:
        events = one_by_one(await read(first, request))
        answers = await asyncio.gather(*(interrupted(events, cut, request, second) for cut in range(len(events) + 1)))
        for answer in answers:
            assert summary(answer, n) == summary(events, n)
            assert_close(logprobs(answer, n), logprobs(events, n))

    asyncio.run(asyncio.wait_for(test(), 120))


@pytest.mark.parametrize("case", ["length limits", "end token", "grammar", "regex"])
def test_cases_reach_the_ends_they_are_about(first, case):
    async def test() -> None:
        (end,) = (e for e in await read(first, asked(**CASES[case])) if isinstance(e, Finished))
        assert end.reason is FinishReason.STOP

    asyncio.run(test())


def test_usage_of_the_prompt_does_not_count_what_was_generated(first):
    async def test() -> None:
        request = asked()
        events = one_by_one(await read(first, request))
        tokens = summary(events, 1)[0][0]
        (end,) = (
            e for e in await read(first, replace(request, generated=(tuple(tokens[:-1]),))) if isinstance(e, Finished)
        )
        assert end.usage.prompt_tokens == len(PROMPT) >= end.usage.cached_tokens
        assert end.usage.completion_tokens == len(tokens)

    asyncio.run(test())


def test_beams_are_searched_again_and_give_what_is_missing(first, second):
    async def test() -> None:
        request = asked(2, temperature=0.0, beams=BeamParams(num_beams=3), ignore_eos=False)
        events = one_by_one(await read(first, request))
        for cut in range(0, len(events) + 1, 3):
            answer = await interrupted(events, cut, request, second)
            assert summary(answer, 2) == summary(events, 2)

    asyncio.run(test())


def test_continuation_that_fits_no_request_is_refused(first):
    async def test() -> None:
        for generated in ((None,), ((1,), (2,))):
            with pytest.raises(InvalidRequest, match="generated"):
                await first.submit(replace(asked(), generated=generated))

    asyncio.run(test())
