"""A request ready to be submitted: what is generated, how it is told, what is counted. One shape for every kind.

An endpoint prepares it; `Exchange` runs it and knows nothing of tokens or images. `P` is the endpoint's own piece of
output: some text of a choice, a preview of an image.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

P = TypeVar("P")
P_in = TypeVar("P_in", contravariant=True)


class Generation(Protocol[P]):
    """What is generated."""

    async def start(self) -> None:
        """Return when all of it is accepted; raise what refuses it, and leave nothing running then."""
        ...

    def pieces(self) -> AsyncGenerator[list[P]]:
        """Lists of pieces until all is complete; raises what a failure raises. Close it to cancel."""
        ...

    async def aclose(self) -> None:
        """Cancel what is unfinished. At any time, more than once."""
        ...


class Format(Protocol[P]):
    """How it is told."""

    async def events(self, pieces: list[P]) -> list[bytes]:
        """Server-sent events, in parts of at most some 100 KB; empty for nothing to say."""
        ...

    def ending(self) -> bytes:
        """What follows the last event of a complete stream."""
        ...

    def failure(self, error: BaseException) -> bytes:
        """The last event of a stream that fails after its first byte."""
        ...

    async def whole(self, pieces: list[P]) -> list[bytes]:
        """All pieces as one JSON answer, in parts."""
        ...


class Meter(Protocol[P_in]):
    """What is counted, from acceptance on."""

    def accepted(self) -> None: ...
    def saw(self, pieces: Sequence[P_in]) -> None: ...

    def ended(self, error: BaseException | None) -> None:
        """Called once, however it ended."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared(Generic[P]):
    """All that an exchange needs."""

    generation: Generation[P]
    format: Format[P]
    meter: Meter[P]


Ready = Prepared[Any]
"""Of any kind."""
