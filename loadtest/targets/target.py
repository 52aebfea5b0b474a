"""What can be put under load: it takes what is asked, and tells an `Outcome` what came and when."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from loadtest.measure.outcome import Outcome, Picture
from loadtest.traffic.ask import Ask

Message = dict[str, str]


class Failed(Exception):
    """A request that did not get its answer. The message is the class of the failure, equal for equal causes."""

    def __init__(self, kind: str, *, is_rejected: bool = False, is_lost: bool = False):
        super().__init__(kind)
        self.is_rejected = is_rejected
        """429: asked to come later."""
        self.is_lost = is_lost
        """There was no connection, or it broke."""


class Target(Protocol):
    """A server, or an engine."""

    def prepare(self, ask: Ask, history: Sequence[Message] = ()) -> Any:
        """What `send` takes; made before the run where it can be, so that the run only sends."""

    async def send(self, prepared: Any, outcome: Outcome, origin: float) -> None:
        """Ask, and fill `outcome` with times since `origin` (perf_counter) until the last byte. Raises Failed; being
        cancelled it tells the other side."""

    async def count_tokens(self, text: str) -> int:
        """Tokens of a text. Raises Failed where nobody can tell."""

    async def is_there(self) -> bool:
        """Whether it can be asked at all."""

    async def queue_seconds(self) -> dict[str, float] | None:
        """Seconds that requests have waited in its queues so far, by model. None: it does not tell."""

    async def aclose(self) -> None: ...


@dataclass(slots=True)
class Spool:
    """Answers with pictures, put aside in a file until the clock has stopped."""

    _file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    _end: int = 0

    def put(self, data: bytes) -> Picture:
        self._file.write(data)
        self._end += len(data)
        return Picture(self._end - len(data), len(data))

    def get(self, picture: Picture) -> bytes:
        self._file.seek(picture.offset)
        data = self._file.read(picture.size_bytes)
        self._file.seek(0, 2)
        return data
