"""One text request ↔ its sequences and their events, over an engine in this process.

A request for `n` choices is `n` sequences with seeds `seed + i`. They share the prompt through the prefix cache: the
first one computes it, the others wait for its blocks. Their streams are merged into one; closing it cancels them all.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

from serve.backend import EventStream, Load
from serve.engine.engine import Engine
from serve.engine.stream import Stream
from serve.errors import InvalidRequest, TandemError
from serve.events import Event, Finished, FinishReason, PromptScored, TokenDelta, Usage
from serve.request import ModelCard, Request, TextRequest
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence, TokenUpdate


class TextBackend:
    """A `Backend` over an engine of sequences. It owns the engine: `aclose()` ends it."""

    def __init__(self, engine: Engine[Sequence, Any, Any], card: ModelCard):
        self._engine = engine
        self._card = card
        self._serial = itertools.count()

    @property
    def card(self) -> ModelCard:
        return self._card

    @property
    def scheduler(self) -> TokenScheduler:
        """For those who read its counters."""
        scheduler = self._engine.scheduler
        assert isinstance(scheduler, TokenScheduler)
        return scheduler

    async def submit(self, request: Request) -> EventStream:
        """All choices or none: if one is refused, those accepted before it are cancelled."""
        if not isinstance(request, TextRequest):
            raise InvalidRequest(f"{self._card.name} is a text model; ask an image model for images", param="model")
        if request.n < 1:
            raise InvalidRequest(f"n is {request.n}; ask for at least one choice", param="n")
        choices: list[Choice] = []
        try:
            for index in range(request.n):
                choices.append(Choice(index, self._engine.submit(self._sequence(request, index))))
        except BaseException:
            for choice in choices:
                await choice.aclose()
            raise
        return choices[0] if len(choices) == 1 else Choices(choices)

    def load(self) -> Load:
        return self._engine.load()

    async def check_health(self) -> None:
        self._engine.check_health()

    async def drain(self, timeout_s: float) -> None:
        await self._engine.drain(timeout_s)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._engine.close)  # it waits for the step that is running

    def _sequence(self, request: TextRequest, index: int) -> Sequence:
        """The serial number makes the id unique: two requests may well come with the same id."""
        return Sequence(
            id=f"{request.request_id}/{next(self._serial)}",
            priority=request.priority,
            timeout_s=request.timeout_s,
            token_ids=list(request.prompt_token_ids),
            num_prompt=len(request.prompt_token_ids),
            sampling=replace(request.sampling, seed=request.sampling.seed + index),
            cache_salt=request.cache_salt,
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
        )


class Choice:
    """An `EventStream`: what one sequence's updates mean to the caller."""

    def __init__(self, index: int, stream: Stream[Sequence]):
        self._index = index
        self._stream = stream
        self._has_begun = False
        self._has_ended = False
        self._is_closed = False

    def __aiter__(self) -> Choice:
        return self

    async def __anext__(self) -> list[Event]:
        if self._has_ended:
            raise StopAsyncIteration
        updates: list[TokenUpdate] = await anext(self._stream, [])
        self._has_ended = self._stream.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if self._is_closed or not (updates or self._has_ended):
            raise StopAsyncIteration
        if not self._has_ended:
            return self._tokens(updates)
        updates += self._stream.take()  # what came after the read, before the end
        return [*self._tokens(updates), self._finished()]

    async def aclose(self) -> None:
        self._is_closed = True
        await self._stream.aclose()

    def _tokens(self, updates: list[TokenUpdate]) -> list[Event]:
        """Everything since the last read, as one delta."""
        events: list[Event] = [PromptScored(u.prompt_logprobs) for u in updates if u.prompt_logprobs is not None]
        token_ids = tuple(token_id for update in updates for token_id in update.token_ids)
        if token_ids:
            logprobs = tuple(entry for update in updates for entry in update.logprobs or ())
            num_cached = None if self._has_begun else self._stream.job.num_cached
            self._has_begun = True
            events.append(TokenDelta(self._index, token_ids, logprobs or None, num_cached))
        return events

    def _finished(self) -> Finished:
        job, reason = self._stream.job, self._stream.finish_reason
        assert reason is not None
        num_sampled = job.num_output + (job.stop_token_id is not None)
        usage = Usage(job.num_prompt, num_sampled, job.num_cached)
        return Finished(self._index, reason, usage, job.stop_token_id, job.stop_logprobs)


class Choices:
    """An `EventStream`: several choices as one. Each has a read pending; a read here takes all that are done.

    The first choice has the first word: with it come the log-probabilities of the prompt. If one fails, all end.
    """

    def __init__(self, choices: list[Choice]):
        self._choices = choices
        self._idle, self._held = choices[:1], choices[1:]
        self._reads: dict[asyncio.Task[list[Event] | TandemError], Choice] = {}

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> list[Event]:
        events: list[Event] = []
        while not events:
            while self._idle:
                choice = self._idle.pop()
                self._reads[asyncio.ensure_future(_read(choice))] = choice
            if not self._reads:
                raise StopAsyncIteration
            await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
            for read in [read for read in self._reads if read.done()]:
                choice, result = self._reads.pop(read), read.result()
                if isinstance(result, TandemError):
                    await self.aclose()
                    raise result
                if result:
                    events += result
                    self._idle.append(choice)
            self._idle, self._held = self._idle + self._held, []
        return events

    async def aclose(self) -> None:
        for choice in self._choices:
            await choice.aclose()


async def _read(choice: Choice) -> list[Event] | TandemError:
    """One read, with a choice's end as an empty list and its error as a value: nobody may be left to retrieve them."""
    try:
        return await anext(choice, [])
    except TandemError as error:
        return error
