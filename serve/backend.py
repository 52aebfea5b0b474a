"""The seam between those who ask and those who compute: one method to submit, one stream to read.

`TextBackend` (in the replica's process) and `ChannelClient` (in the gateway's) both satisfy `Backend`, so everything
above is written once and tested in one process. The pattern is httpx's transport: one small interface, a local and a
remote implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from serve.events import Event
from serve.request import ModelCard, Request


@dataclass(frozen=True, slots=True)
class Load:
    """What a scheduler reports for routing, admission and metrics."""

    running: int = 0
    waiting: int = 0
    tokens_waiting: int = 0
    """Work not yet started, in token positions (a denoise step counts its latent tokens)."""
    memory: float = 0.0
    """Share of the cache memory held by unfinished work, 0..1."""
    tokens_owed: int = 0
    """Work accepted and not computed, as far as it is known: prompt positions to prefill, those that the prefix cache
    has left out; latent tokens of all denoise steps left."""
    backlog_s: float = 0.0
    """Predicted: by how much longer a newcomer takes here than it would alone. This and what follows come from the
    engine's `Pace`, 0 without one."""
    unit_s: float = 0.0
    """Predicted seconds for a unit of a newcomer's own work: a prompt position; a pixel of a row of a denoise step."""
    job_s: float = 0.0
    """Predicted seconds that a newcomer adds to `backlog_s` beside that work."""
    offered_s: float = 0.0
    """Predicted seconds of all the work accepted so far: by how much it grows in a second is what is asked for."""


class EventStream(Protocol):
    """Async iterator of lists of events: each read takes all that came since the last one.

    Ends after the last choice's `Finished`, or raises a `TandemError`. `aclose()` cancels what is unfinished, at any
    time and more than once.
    """

    def __aiter__(self) -> EventStream: ...
    async def __anext__(self) -> list[Event]: ...
    async def aclose(self) -> None: ...


class Backend(Protocol):
    """One model, wherever it runs."""

    @property
    def card(self) -> ModelCard: ...

    async def submit(self, request: Request) -> EventStream:
        """Return once the request is accepted; raise `InvalidRequest` or `Unavailable` when it is refused."""
        ...

    def load(self) -> Load: ...

    async def check_health(self) -> None:
        """Raise `EngineDead` when the model can no longer serve."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and return when the accepted ones have ended, at most `timeout_s` later."""
        ...

    async def aclose(self) -> None: ...
