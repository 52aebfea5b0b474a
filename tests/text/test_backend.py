"""A request in, events out: choices, usage, all or none refused, closing, failing; over an engine stepped by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fake_backend import card
from token_device import EOS, VOCAB, RandomLength, TokenDevice, beams_alone, logprob_of, tokens_alone

from serve.engine.engine import Engine
from serve.errors import ContextTooLong, Draining, EngineDead, InvalidRequest, Overloaded, RequestFailed
from serve.events import Event, Finished, FinishReason, PromptScored, TokenDelta, Usage
from serve.request import BeamParams, SamplingParams, TextRequest
from serve.text.backend import TextBackend
from serve.text.kv_cache import KVCache
from serve.text.scheduler import TokenScheduler

PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9)


class Setup:
    """A backend over a fake device; `read` steps the engine until a stream has ended."""

    def __init__(self, *, max_waiting: int = 64, fails=lambda batch: False):
        self.cache = KVCache(num_blocks=64, block_size=4)
        self.scheduler = TokenScheduler(
            self.cache, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=128,
            eos_token_ids=[EOS], vocab_size=VOCAB,
        )  # fmt: skip
        self.device = TokenDevice(64, 4, fails)
        self.engine = Engine(self.scheduler, self.device, max_waiting=max_waiting)
        self.backend = TextBackend(self.engine, card())

    async def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.engine.step()
            for _ in range(5):
                await asyncio.sleep(0)  # readers run

    async def read(self, stream) -> list[Event]:
        events: list[Event] = []

        async def reader() -> None:
            async for more in stream:
                assert more, "a read without events"
                events.extend(more)

        task = asyncio.ensure_future(reader())
        while not task.done():
            await self.step()
        await task
        return events

    @property
    def is_idle(self) -> bool:
        load = self.backend.load()
        return load.running == load.waiting == 0 and self.cache.num_free == self.cache.num_blocks


def request(*, n: int = 1, prompt=PROMPT, prompt_logprobs: int | None = None, **sampling) -> TextRequest:
    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, "seed": 5} | sampling)
    return TextRequest(
        request_id="r", model="fake", prompt_token_ids=tuple(prompt), sampling=params, n=n,
        prompt_logprobs=prompt_logprobs,
    )  # fmt: skip


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def ids_of(events: list[Event], index: int = 0) -> list[int]:
    deltas = [event for event in events if isinstance(event, TokenDelta) and event.index == index]
    return [token_id for delta in deltas for token_id in delta.token_ids]


def expected(seed: int, **sampling) -> list[int]:
    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | sampling, seed=seed)
    return tokens_alone(list(PROMPT), params)


def test_one_choice_gives_its_tokens_then_one_finish_with_usage():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request()))
        assert ids_of(events) == expected(5)
        assert events[-1] == Finished(0, FinishReason.LENGTH, Usage(9, 6, 0))
        assert sum(isinstance(event, Finished) for event in events) == 1
        assert setup.is_idle

    run(test)


def test_the_end_token_is_reported_and_not_delivered():
    async def test():
        setup = Setup()
        stop = expected(5)[3]
        first = expected(5).index(stop)
        events = await setup.read(await setup.backend.submit(request(stop_token_ids=(stop,))))
        assert ids_of(events) == expected(5)[:first]
        assert events[-1] == Finished(0, FinishReason.STOP, Usage(9, first + 1, 0), stop)

    run(test)


def test_a_choice_that_ends_before_its_first_token_has_only_a_finish():
    async def test():
        setup = Setup()
        stop = expected(5)[0]
        events = await setup.read(await setup.backend.submit(request(stop_token_ids=(stop,))))
        assert events == [Finished(0, FinishReason.STOP, Usage(9, 1, 0), stop)]

    run(test)


def test_the_end_token_is_scored_like_any_other():
    async def test():
        setup = Setup()
        stop = expected(5)[0]
        events = await setup.read(await setup.backend.submit(request(stop_token_ids=(stop,), logprobs=1)))
        assert events[-1].stop_logprobs is not None and events[-1].stop_logprobs.token_id == stop

    run(test)


def test_choices_draw_from_seeds_in_a_row_and_share_the_prompt():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request(n=3)))
        for index in range(3):
            assert ids_of(events, index) == expected(5 + index)
        finishes = sorted((event for event in events if isinstance(event, Finished)), key=lambda event: event.index)
        assert [finish.usage.cached_tokens for finish in finishes] == [0, 8, 8]
        prefilled = [len(row.token_ids) for batch in setup.device.batches for row in batch.rows if row.start < 9]
        assert prefilled == [9, 1, 1]

    run(test)


def test_cached_tokens_are_told_with_the_first_tokens_only():
    async def test():
        setup = Setup()
        await setup.read(await setup.backend.submit(request()))
        events = await setup.read(await setup.backend.submit(request()))
        deltas = [event for event in events if isinstance(event, TokenDelta)]
        assert [delta.num_cached for delta in deltas] == [8] + [None] * (len(deltas) - 1)
        assert len(deltas) > 1

    run(test)


@pytest.mark.parametrize("n", [1, 3])
def test_prompt_is_scored_once_and_before_the_first_token(n):
    async def test():
        setup = Setup()
        await setup.read(await setup.backend.submit(request()))  # a cache that would spare the computation
        events = await setup.read(await setup.backend.submit(request(n=n, prompt_logprobs=0)))
        scores = (None, *(logprob_of([*PROMPT[: i + 1]]) for i in range(1, len(PROMPT))))
        assert events[0] == PromptScored(scores)
        assert sum(isinstance(event, PromptScored) for event in events) == 1

    run(test)


def test_scoring_alone_generates_nothing():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request(prompt_logprobs=0, max_tokens=0)))
        assert isinstance(events[0], PromptScored)
        assert events[1:] == [Finished(0, FinishReason.LENGTH, Usage(9, 0, 0))]

    run(test)


def test_logprobs_describe_the_tokens_beside_them():
    async def test():
        setup = Setup()
        events = await setup.read(await setup.backend.submit(request(logprobs=0)))
        deltas = [event for event in events if isinstance(event, TokenDelta)]
        assert [entry.token_id for delta in deltas for entry in delta.logprobs] == expected(5)
        assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)

    run(test)


def test_a_slow_reader_gets_everything_in_one_piece():
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request())
        await setup.step(20)
        assert await anext(stream) == [
            TokenDelta(0, tuple(expected(5)), None, 0),
            Finished(0, FinishReason.LENGTH, Usage(9, 6, 0)),
        ]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(test)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_closing_cancels_every_choice_at_the_next_step(n, num_steps):
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(n=n, max_tokens=100))
        await setup.step(num_steps)
        await stream.aclose()
        await stream.aclose()
        await setup.step()
        assert setup.is_idle
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(test)


@pytest.mark.parametrize("n", [1, 3])
def test_closing_wakes_a_reader_that_waits(n):
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(n=n))
        reader = asyncio.ensure_future(anext(stream, "ended"))
        await asyncio.sleep(0)
        await stream.aclose()
        assert await reader == "ended"

    run(test)


def test_a_reader_that_was_interrupted_misses_nothing():
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request(n=2))
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        events = await setup.read(stream)
        assert [ids_of(events, index) for index in range(2)] == [expected(5), expected(6)]

    run(test)


def test_a_refused_choice_cancels_those_accepted_before():
    async def test():
        setup = Setup(max_waiting=2)
        with pytest.raises(Overloaded) as refusal:
            await setup.backend.submit(request(n=3))
        assert refusal.value.retry_after_s is not None
        await setup.step()
        assert setup.is_idle
        assert setup.device.batches == []

    run(test)


def test_what_can_never_run_is_refused_at_once():
    async def test():
        setup = Setup()
        for refused, error in [
            (request(max_tokens=1000), ContextTooLong),
            (request(prompt=()), InvalidRequest),
            (request(prompt=(VOCAB,)), InvalidRequest),
            (request(n=0), InvalidRequest),
        ]:
            with pytest.raises(error):
                await setup.backend.submit(refused)

    run(test)


def test_equal_request_ids_do_not_meet():
    async def test():
        setup = Setup()
        first, second = await setup.backend.submit(request()), await setup.backend.submit(request(seed=6))
        assert ids_of(await setup.read(first)) == expected(5)
        assert ids_of(await setup.read(second)) == expected(6)

    run(test)


def test_a_choice_that_fails_raises_and_ends_the_others():
    async def test():
        setup = Setup(fails=lambda batch: any(row.job.sampling.seed == 6 and row.start >= 10 for row in batch.rows))
        with pytest.raises(RequestFailed):
            await setup.read(await setup.backend.submit(request(n=3, max_tokens=50)))
        await setup.step()
        assert setup.is_idle

    run(test)


def test_draining_refuses_the_new_and_finishes_the_accepted():
    async def test():
        setup = Setup()
        stream = await setup.backend.submit(request())
        drained = asyncio.ensure_future(setup.backend.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await setup.backend.submit(request())
        assert not drained.done()
        assert ids_of(await setup.read(stream)) == expected(5)
        await drained

    run(test)


def test_health_is_the_engines():
    async def test():
        setup = Setup()
        await setup.backend.check_health()
        setup.scheduler.schedule = None  # a bug of ours
        stream = await setup.backend.submit(request())
        await setup.step()
        with pytest.raises(EngineDead):
            await anext(stream)
        with pytest.raises(EngineDead):
            await setup.backend.check_health()

    run(test)


def test_serving_from_the_engines_own_thread():
    async def test():
        setup = Setup()
        setup.engine.start()
        streams = [await setup.backend.submit(request(seed=seed, n=2)) for seed in range(0, 20, 2)]

        async def everything(stream) -> list[Event]:
            return [event async for events in stream for event in events]

        for seed, events in zip(range(0, 20, 2), await asyncio.gather(*map(everything, streams))):
            assert [ids_of(events, index) for index in range(2)] == [expected(seed), expected(seed + 1)]
        await setup.backend.aclose()
        assert setup.is_idle

    run(test)


def test_a_beam_request_is_one_job_with_its_best_hypotheses_as_choices():
    async def test() -> None:
        setup = Setup()
        sampling = {"beams": BeamParams(num_beams=3), "ignore_eos": False, "logprobs": 0}
        events = await setup.read(await setup.backend.submit(request(n=2, **sampling)))
        params = SamplingParams(**{"max_tokens": 6, "seed": 5} | sampling)
        for index, found in enumerate(beams_alone(list(PROMPT), params)[:2]):
            is_stopped = found.reason is FinishReason.STOP
            assert ids_of(events, index) == list(found.tokens[: len(found.tokens) - is_stopped])
            (end,) = (event for event in events if isinstance(event, Finished) and event.index == index)
            assert (end.reason, end.score) == (found.reason, found.score)
            assert end.usage == Usage(len(PROMPT), len(found.tokens), 0)
            assert end.stop_token_id == (found.tokens[-1] if is_stopped else None)
        assert setup.is_idle

    run(test)


def test_the_settled_part_of_one_hypothesis_is_streamed():
    async def test() -> None:
        setup = Setup()
        sampling = {"beams": BeamParams(num_beams=2), "max_tokens": 24}
        events = await setup.read(await setup.backend.submit(request(**sampling)))
        (found, _) = beams_alone(list(PROMPT), SamplingParams(**{"ignore_eos": True, "seed": 5} | sampling))
        assert ids_of(events) == list(found.tokens)
        assert sum(isinstance(event, TokenDelta) for event in events) > 1

    run(test)


def test_drafts_change_no_token_and_the_usage_tells_them():
    async def test():
        setup = Setup()
        setup.scheduler.draft_length = RandomLength(4)
        events = await setup.read(await setup.backend.submit(request(max_tokens=40)))
        assert ids_of(events) == expected(5, max_tokens=40)
        used = events[-1].usage
        assert used.completion_tokens == 40 and used.accepted_tokens > 0 and used.rejected_tokens > 0
        num_drafted = sum(len(batch.rows[0].drafts) for batch in setup.device.batches)
        assert used.accepted_tokens + used.rejected_tokens == num_drafted

    run(test)
