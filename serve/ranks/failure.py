"""Why a group of ranks was lost: of all that was seen, what came first and says most.

When one rank fails, the others soon fail too, in the collective they share with it. So words of torch.distributed about
a lost connection count less than anything else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from serve.errors import ConfigError, EngineDead, TandemError


@dataclass(frozen=True, slots=True)
class Loss:
    """What was seen of one rank's end."""

    rank: int
    process: str
    message: str
    """Its own words, or how its process ended."""
    is_config: bool = False
    param: str | None = None
    is_own: bool = False
    """The rank said it, and not of another rank's end."""
    is_echo: bool = False
    """A collective failed, for the sake of another rank perhaps."""

    @classmethod
    def from_words(cls, rank: int, process: str, body: bytes) -> Loss:
        """What a peer sent as its last frame."""
        words = json.loads(body)
        kind, message, is_echo = str(words["type"]), str(words["message"]), bool(words["is_echo"])
        if "code" in words:
            is_config = words["code"] == ConfigError.code
            return cls(rank, process, message, is_config, words["param"] or None, is_own=True)
        return cls(rank, process, f"{kind}: {message}", is_own=not is_echo, is_echo=is_echo)

    def to_error(self) -> TandemError:
        if self.is_config:
            return ConfigError(self.message, param=self.param)
        return EngineDead(f"rank {self.rank} ({self.process}) failed: {self.message}")


def first_cause(losses: list[Loss]) -> Loss:
    """Own words, else an end without words, else an echo; the earliest of equals."""
    return min(losses, key=lambda loss: (not loss.is_own, loss.is_echo))


def is_echo(error: BaseException) -> bool:
    """Whether a collective failed: most likely because another rank did."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error)
