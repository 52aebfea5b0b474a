"""A placed request that outlives its replica: when that is lost, another one goes on where it stopped.

The client's stream makes a pause and goes on with the tokens it would have had: seeds are concrete before the first
placement, and the sampler is keyed by seed and position. What the channel had delivered counts as generated, what was
lost on the way is generated again. A replica that drains and does not get done is left in the same way.

What was begun on one model and config is never continued on others, as after an update: then only replicas of equal
fingerprint will do, unless nothing has been shown yet.

A request whose replicas keep dying may be what kills them: after `MAX_LOST` it is given up, with an error of its own,
or tried alone once more where others were lost with it each time (`suspects.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from serve.backend import EventStream
from serve.errors import DeadlineExceeded, Draining, EngineDead, Quarantined, ReplicaLost, TandemError
from serve.events import Event
from serve.gateway.delivered import Delivered
from serve.gateway.suspects import Suspects
from serve.request import Request

log = logging.getLogger(__name__)

MAX_LOST = 2
"""Replicas that a request may lose."""
MAX_MOVES = 16
"""Of one request, deaths and drains: a long answer may well see a rolling update of many replicas."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A request at a replica that has accepted it."""

    replica_id: str
    fingerprint: str
    """Of the replica's model and config."""
    stream: EventStream
    leave: Callable[[], None]
    """Called once when the stream is of no use any more."""
    note_loss: Callable[[], None]
    """Called before when the replica has died, with all that it had."""


class Placer(Protocol):
    """Who finds replicas (`Pool`)."""

    suspects: Suspects

    async def place_again(
        self, request: Request, lost: list[str], until: float | None, fingerprint: str | None
    ) -> Placement:
        """Wait for a replica to accept, not beyond the loop's time `until`. `fingerprint`: only replicas of that one;
        None: any. `lost` takes those that die meanwhile; ReplicaLost when they are `MAX_LOST` then."""
        ...

    def moved(self, request: Request) -> None: ...

    def gave_up(self, request: Request) -> None: ...


class PlacedStream:
    """An `EventStream` over as many replicas as it takes. One reader."""

    def __init__(
        self,
        request: Request,
        placement: Placement | None,
        placer: Placer,
        delivered: Delivered,
        lost: list[str],
        began: float,
    ) -> None:
        """`placement`: None for one that is to `begin`. `lost`: replicas that have died with the request, `began`: the
        loop's time when it was submitted."""
        self._request = request
        self._placement = placement
        self._placer = placer
        self._delivered = delivered
        self._lost = lost
        self._until = None if request.timeout_s is None else began + request.timeout_s
        self._num_moves = 0
        self._is_closed = False
        self._ahead: list[Event] = []
        """Read on trial, not passed on yet."""

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> list[Event]:
        while (placement := self._placement) is not None:
            try:
                piece, self._ahead = self._ahead or await placement.stream.__anext__(), []
                events = self._delivered.take(piece)
            except (ReplicaLost, EngineDead, Draining) as loss:
                if self._is_closed:
                    break
                await self._move(placement, loss)
                continue
            if events:
                return events
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what is unfinished. A move under way ends by the reader's cancellation, or with nothing to read."""
        placement, self._placement = self._placement, None
        self._is_closed = True
        if placement is not None:
            await _leave(placement)

    async def begin(self) -> None:
        """Find a replica for a new request that was at `MAX_LOST` when they died, before any had accepted it."""
        self._placement, again = await self._place(None)
        if again is not None:
            await self._move(self._placement, again)

    async def _move(self, placement: Placement, loss: TandemError) -> None:
        """Go on elsewhere. Raises what the client is to read when that cannot be; `_placement` is then None."""
        loop, self._placement = asyncio.get_running_loop(), None
        began, has_died = loop.time(), not isinstance(loss, Draining)
        if has_died:
            placement.note_loss()
        await _leave(placement)
        if self._delivered.is_complete:
            return
        if has_died:
            self._lost.append(placement.replica_id)
            require_innocent(self._request, self._lost, self._placer)
        if self._num_moves == MAX_MOVES:
            raise loss
        if not self._delivered.is_exact:
            raise ReplicaLost(
                f"{loss.message} (its tokens depended on drafts rejected by chance, so no other replica can go on with "
                f"the same ones; rejection_sample_method: coupled would)"
            ) from None
        self._num_moves += 1
        new, again = await self._place(placement.fingerprint if self._delivered.has_begun else None)
        log.warning(
            "request moved id=%s from=%s to=%s loss=%s pause_s=%.3f",
            *(self._request.request_id, placement.replica_id, new.replica_id, loss.code, loop.time() - began),
        )
        self._placer.moved(self._request)
        if self._is_closed:
            await _leave(new)
        elif again is not None:
            await self._move(new, again)
        else:
            self._placement = new

    async def _place(self, fingerprint: str | None) -> tuple[Placement, Draining | None]:
        """At a replica of that fingerprint, on trial when enough have died with the request. With what it left the
        replica by, if it did during its trial."""
        while True:
            num_lost = len(self._lost)
            is_suspect = num_lost >= MAX_LOST
            async with self._placer.suspects.trial(self._request.model) if is_suspect else nullcontext():
                try:
                    new = await self._placer.place_again(self._delivered.rest(), self._lost, self._until, fingerprint)
                except ReplicaLost:
                    if len(self._lost) == num_lost:
                        raise
                    continue  # one died before it had accepted the request, which is now a suspect
                return new, await self._stand_trial(new) if is_suspect else None

    async def _stand_trial(self, placement: Placement) -> Draining | None:
        """Return when the replica has survived this request's first step there, or how it was left before.
        Raises Quarantined."""
        try:
            self._ahead = await placement.stream.__anext__()
        except StopAsyncIteration:
            pass  # there is nothing more, as the next read will find
        except Draining as loss:
            return loss
        except (ReplicaLost, EngineDead):
            await _leave(placement)
            self._lost.append(placement.replica_id)
            raise convicted(self._request, self._lost, self._placer) from None
        except BaseException:
            await _leave(placement)
            raise
        return None


def require_innocent(request: Request, lost: list[str], placer: Placer) -> None:
    """Raise Quarantined when the request has lost as many replicas as it may, and no other one was at all of them."""
    if len(lost) >= MAX_LOST and not placer.suspects.are_several(request.request_id, lost):
        raise convicted(request, lost, placer)


def convicted(request: Request, lost: list[str], placer: Placer) -> Quarantined:
    placer.gave_up(request)
    log.error("request quarantined id=%s lost=%s", request.request_id, ",".join(lost))
    return Quarantined(
        f"{len(lost)} replicas of {request.model} were lost while they computed this request, which may be the cause; "
        f"it is not tried on another one. Tell the operator its id, {request.request_id!r}"
    )


def shortened(request: Request, until: float | None, now: float) -> Request:
    """With what is left of its time. Raises DeadlineExceeded."""
    if until is None:
        return request
    if until <= now:
        raise DeadlineExceeded(
            f"the request's deadline of {request.timeout_s:g} s passed after its replica was lost; allow more time"
        )
    return replace(request, timeout_s=until - now)


async def _leave(placement: Placement) -> None:
    try:
        await placement.stream.aclose()
    finally:
        placement.leave()
