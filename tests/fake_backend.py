"""A backend whose streams a test feeds by hand, or which counts by itself: token i of a request is i."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from serve.backend import Load
from serve.errors import Draining, InvalidRequest, Overloaded, TandemError
from serve.events import Event, Finished, FinishReason, TokenDelta, Usage
from serve.request import ModelCard, SamplingParams, TextRequest


def card(name: str = "fake") -> ModelCard:
    return ModelCard(
        name=name, kind="text", source="memory", device="cpu", dtype="float32", num_parameters=7, max_model_len=4096,
        kv_cache_tokens=8192, vocab_size=100, threads=1, load_s=0.0, aliases=("other",),
    )  # fmt: skip


def request(request_id: str = "r", *, max_tokens: int = 5, prompt: Iterable[int] = (1, 2, 3)) -> TextRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    return TextRequest(request_id=request_id, model="fake", prompt_token_ids=tuple(prompt), sampling=sampling)


def finished(num_tokens: int, index: int = 0) -> Finished:
    return Finished(index, FinishReason.LENGTH, Usage(prompt_tokens=3, completion_tokens=num_tokens))


class FakeStream:
    """An `EventStream`: `put` events, then `end` it. Remembers that it was closed, and the size of every read."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.closed = asyncio.Event()
        self._events: list[Event] = []
        self._error: TandemError | None = None
        self._is_ended = False
        self._changed = asyncio.Event()

    def put(self, *events: Event) -> None:
        self._events.extend(events)
        self._changed.set()

    def end(self, error: TandemError | None = None) -> None:
        self._is_ended, self._error = True, error
        self._changed.set()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> list[Event]:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        events, self._events = self._events, []
        self.reads.append(len(events))
        return events

    async def aclose(self) -> None:
        self.closed.set()


class FakeBackend:
    """A `Backend`. With `period_s` it produces a token per stream that often; without, the test does."""

    def __init__(self, *, period_s: float | None = None, max_streams: int = 1000):
        self.card = card()
        self.period_s = period_s
        self.max_streams = max_streams
        self.requests: list[TextRequest] = []
        self.streams: list[FakeStream] = []
        self.is_draining = False
        self.submitted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return sum(not stream.closed.is_set() for stream in self.streams)

    async def submit(self, request: TextRequest) -> FakeStream:
        if self.is_draining:
            raise Draining("the fake is draining")
        if request.sampling.max_tokens > 1 << 20:
            raise InvalidRequest("max_tokens is too large; lower it", param="max_tokens")
        if self.num_open >= self.max_streams:
            raise Overloaded("the fake is full; try later", retry_after_s=1.5)
        self.requests.append(request)
        self.streams.append(stream := FakeStream())
        if self.period_s is not None:
            task = asyncio.create_task(self._count(stream, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.submitted.set()
        return stream

    async def _count(self, stream: FakeStream, request: TextRequest) -> None:
        for token in range(request.sampling.max_tokens):
            await asyncio.sleep(self.period_s or 0)
            if stream.closed.is_set():
                return
            stream.put(TokenDelta(0, (token,)))
        stream.put(finished(request.sampling.max_tokens))
        stream.end()

    def load(self) -> Load:
        return Load(running=self.num_open)

    async def check_health(self) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True
        waiting = [asyncio.create_task(stream.closed.wait()) for stream in self.streams]
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_s)

    async def aclose(self) -> None: ...
