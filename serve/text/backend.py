"""One text request ↔ its sequences and their events, over an engine in this process.

A request for `n` choices is `n` sequences with seeds `seed + i`. They share the prompt through the prefix cache: the
first one computes it, the others wait for its blocks. Their streams are merged into one; closing it cancels them all.

A request that another replica has begun goes on as after preemption by recompute: its sequences begin with the tokens
given there, so seed and position, penalties, lengths and grammar are what they would have been.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

from serve.backend import EventStream, Load
from serve.engine.engine import Engine
from serve.engine.stream import Stream
from serve.errors import InvalidRequest
from serve.events import Event, Finished, FinishReason, PromptScored, TokenDelta, Usage
from serve.merged import merge
from serve.request import Grammar, ModelCard, Request, TextRequest
from serve.text.beams.choices import BeamChoices
from serve.text.beams.group import BeamGroup
from serve.text.build_ranks import Ranks
from serve.text.grammar.compiler import Compiled, GrammarCompiler
from serve.text.grammar.grammar import Matcher
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence, TokenUpdate


class TextBackend:
    """A `Backend` over an engine of sequences. It owns the engine: `aclose()` ends it."""

    def __init__(
        self,
        engine: Engine[Sequence, Any, Any],
        card: ModelCard,
        grammars: GrammarCompiler | None = None,
        ranks: Ranks | None = None,
    ):
        """Without `grammars` a request for constrained output is refused. `ranks`: end with this."""
        self._engine = engine
        self._card = card
        self._grammars = grammars
        self._ranks = ranks
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
        grammar = await self._compile(request.sampling.grammar)
        if request.sampling.beams is not None:
            return BeamChoices(self._engine.submit(self._beam_group(request, grammar)))
        choices: list[EventStream] = []
        try:
            for index, generated in enumerate(_generated(request)):
                if generated is not None:
                    choices.append(await self._begin(request, index, generated, grammar))
        except BaseException:
            for choice in choices:
                await choice.aclose()
            raise
        return merge(choices)

    def load(self) -> Load:
        return self._engine.load()

    async def check_health(self) -> None:
        self._engine.check_health()

    async def drain(self, timeout_s: float) -> None:
        await self._engine.drain(timeout_s)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._engine.close)  # it waits for the step that is running
        if self._ranks is not None:
            await asyncio.to_thread(self._ranks.close)
        if self._grammars is not None:
            await asyncio.to_thread(self._grammars.close)

    async def _compile(self, grammar: Grammar | None) -> Compiled | None:
        if grammar is None:
            return None
        if self._grammars is None:
            raise InvalidRequest(f"{grammar.param}: this model has no tokenizer here to constrain", param=grammar.param)
        return await self._grammars.compile(grammar)

    def _beam_group(self, request: TextRequest, grammar: Compiled | None) -> BeamGroup:
        return BeamGroup(
            id=f"{request.request_id}/{next(self._serial)}",
            priority=request.priority,
            timeout_s=request.timeout_s,
            traceparent=request.traceparent,
            tracestate=request.tracestate,
            token_ids=list(request.prompt_token_ids),
            num_prompt=len(request.prompt_token_ids),
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            prompt_logprobs=request.prompt_logprobs,
            matcher=None if grammar is None else grammar.start(request.sampling),
            num_returned=request.n,
        )

    async def _begin(
        self, request: TextRequest, index: int, generated: tuple[int, ...], grammar: Compiled | None
    ) -> EventStream:
        sequence = self._sequence(request, index, generated, grammar)
        if generated and sequence.matcher is not None:
            await asyncio.to_thread(_follow, sequence.matcher, generated)
        reason = _end_reached(sequence) if generated else None
        if reason is not None:
            return Ended(Finished(index, reason, Usage(sequence.num_prompt, len(generated))))
        return Choice(index, self._engine.submit(sequence))

    def _sequence(
        self, request: TextRequest, index: int, generated: tuple[int, ...], grammar: Compiled | None
    ) -> Sequence:
        """The serial number makes the id unique: two requests may well come with the same id."""
        return Sequence(
            id=f"{request.request_id}/{next(self._serial)}",
            priority=request.priority,
            timeout_s=request.timeout_s,
            traceparent=request.traceparent,
            tracestate=request.tracestate,
            token_ids=[*request.prompt_token_ids, *generated],
            num_prompt=len(request.prompt_token_ids),
            sampling=replace(request.sampling, seed=request.sampling.seed + index),
            cache_salt=request.cache_salt,
            prompt_logprobs=request.prompt_logprobs if index == 0 else None,
            matcher=None if grammar is None else grammar.start(request.sampling),
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
            num_cached = None if self._has_begun else self._num_cached
            self._has_begun = True
            events.append(TokenDelta(self._index, token_ids, logprobs or None, num_cached))
        return events

    def _finished(self) -> Finished:
        job, reason = self._stream.job, self._stream.finish_reason
        assert reason is not None
        num_sampled = job.num_output + (job.stop_token_id is not None)
        num_rejected = job.num_drafted - job.num_accepted
        usage = Usage(job.num_prompt, num_sampled, self._num_cached, job.num_accepted, num_rejected)
        return Finished(self._index, reason, usage, job.stop_token_id, job.stop_logprobs)

    @property
    def _num_cached(self) -> int:
        """Of the prompt: what was generated elsewhere may be found in the cache too."""
        return min(self._stream.job.num_cached, self._stream.job.num_prompt)


class Ended:
    """An `EventStream` of a choice that was complete when its replica was lost, which could not say so any more."""

    def __init__(self, finished: Finished):
        self._events: list[Event] = [finished]

    def __aiter__(self) -> Ended:
        return self

    async def __anext__(self) -> list[Event]:
        if not self._events:
            raise StopAsyncIteration
        events, self._events = self._events, []
        return events

    async def aclose(self) -> None:
        self._events = []


def _generated(request: TextRequest) -> tuple[tuple[int, ...] | None, ...]:
    """What each choice begins with; None for one that is not to be computed."""
    generated = request.generated or ((),) * request.n
    if len(generated) != request.n or all(tokens is None for tokens in generated):
        raise InvalidRequest(
            f"generated has {len(generated)} entries and n is {request.n}; give one a choice, and not only None",
            param="generated",
        )
    return generated


def _follow(matcher: Matcher, generated: tuple[int, ...]) -> None:
    for token_id in generated:
        matcher.accept(token_id)


def _end_reached(sequence: Sequence) -> FinishReason | None:
    """Why a sequence that goes on is complete already, if it is."""
    if sequence.matcher is not None and sequence.matcher.is_complete:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_output >= sequence.sampling.max_tokens else None
