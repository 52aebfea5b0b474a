"""Everything a text request generates: its backend requests as one stream of pieces of text.

    prompt 0 ── TextRequest (n choices) ── EventStream ─┐
    prompt 1 ── TextRequest (n choices) ── EventStream ─┴─ merged, one list of pieces per engine step and stream

Where the gateway may end a choice (stop strings, one call only) each is a request of its own, since closing a stream is
the only way to cancel, and closes all of it. The prefix cache makes the prompt cost once either way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from serve.backend import EventStream
from serve.errors import ReplicaLost
from serve.events import Event, Finished, PromptScored, TokenDelta, TokenLogprobs
from serve.gateway.choices import Choice, Piece
from serve.request import TextRequest

Submit = Callable[[TextRequest], Awaitable[EventStream]]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One backend request and the choices it answers, in the order of its own indices."""

    request: TextRequest
    prompt_index: int
    choices: tuple[Choice, ...]


@dataclass(slots=True)
class Tokens:
    """What an HTTP request used so far, all prompts and choices."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    """Of the completion."""
    accepted: int = 0
    rejected: int = 0
    """Draft tokens (speculation): those that became output, and those that did not."""


class TextGeneration:
    """Submit, read, close. `start` raises what a refusal raises; reading raises what a failure raises."""

    def __init__(self, parts: Sequence[Part], submit: Submit) -> None:
        self.prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        """By prompt; there before the prompt's first piece."""
        self._parts = parts
        self._submit = submit
        self._streams: list[EventStream] = []

    async def start(self) -> None:
        """Return when every part is accepted. When one is refused none is left running."""
        try:
            for part in self._parts:
                self._streams.append(await self._submit(part.request))
        except BaseException:
            await self.aclose()
            raise

    async def pieces(self) -> AsyncGenerator[list[Piece]]:
        """Lists of pieces until every choice has ended. Close the iterator to cancel."""
        try:
            if len(self._parts) == 1:
                async for events in self._streams[0]:
                    if pieces := self._take(self._parts[0], events):
                        yield pieces
                    if _is_done(self._parts[0]):
                        break
            else:
                async with aclosing(self._merged()) as merged:
                    async for pieces in merged:
                        yield pieces
            if not all(_is_done(part) for part in self._parts):
                raise ReplicaLost("the answer ended before it was complete; send the request again")
        finally:
            await self.aclose()

    def tokens(self) -> Tokens:
        used = Tokens()
        counted: set[int] = set()
        for part in self._parts:
            used.completion += sum(choice.num_tokens for choice in part.choices)
            used.reasoning += sum(choice.num_reasoning for choice in part.choices)
            used.accepted += sum(choice.num_accepted for choice in part.choices)
            used.rejected += sum(choice.num_rejected for choice in part.choices)
            if part.prompt_index not in counted:
                counted.add(part.prompt_index)
                used.prompt += len(part.request.prompt_token_ids)
                used.cached += part.choices[0].num_cached
        return used

    def finish_reasons(self) -> tuple[str, ...]:
        """Of the choices that have ended, all prompts'."""
        reasons = (choice.finish_reason for part in self._parts for choice in part.choices)
        return tuple(reason for reason in reasons if reason is not None)

    async def aclose(self) -> None:
        """Cancel what is unfinished. At any time, more than once."""
        streams, self._streams = self._streams, []
        for stream in streams:
            await stream.aclose()

    def _take(self, part: Part, events: Sequence[Event]) -> list[Piece]:
        """At most one piece a choice, plus its last one."""
        pieces: list[Piece | None] = []
        deltas: dict[int, list[TokenDelta]] = {}
        finished: list[Finished] = []
        for event in events:
            if isinstance(event, TokenDelta):
                deltas.setdefault(event.index, []).append(event)
            elif isinstance(event, Finished):
                finished.append(event)
            elif isinstance(event, PromptScored):
                self.prompt_logprobs[part.prompt_index] = event.logprobs
        for index, own in deltas.items():
            pieces.append(part.choices[index].push(own))
        for event in finished:
            pieces.append(part.choices[event.index].finish(event))
        return [piece for piece in pieces if piece is not None]

    async def _merged(self) -> AsyncGenerator[list[Piece]]:
        """The pieces of all parts as they come. A part whose choices have ended is closed while others go on."""
        merged: asyncio.Queue[_Read] = asyncio.Queue(maxsize=len(self._parts))
        readers = {
            part: asyncio.create_task(_read(part, stream, merged)) for part, stream in zip(self._parts, self._streams)
        }
        unfinished = set(self._parts)
        try:
            while unfinished:
                read = await merged.get()
                if read.error is not None:
                    raise read.error
                if pieces := self._take(read.part, read.events):
                    yield pieces
                if read.part in unfinished and _is_done(read.part):
                    unfinished.discard(read.part)
                    readers[read.part].cancel()
                elif read.is_last and read.part in unfinished:
                    break
        finally:
            for reader in readers.values():
                reader.cancel()
            await asyncio.gather(*readers.values(), return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Read:
    """What a reader task got from one stream: events, its end, or its failure."""

    part: Part
    events: Sequence[Event] = ()
    is_last: bool = False
    error: Exception | None = None


async def _read(part: Part, stream: EventStream, merged: asyncio.Queue[_Read]) -> None:
    try:
        async for events in stream:
            await merged.put(_Read(part, events))
        await merged.put(_Read(part, is_last=True))
    except Exception as error:
        await merged.put(_Read(part, error=error))
    finally:
        await stream.aclose()


def _is_done(part: Part) -> bool:
    return all(choice.is_finished for choice in part.choices)
