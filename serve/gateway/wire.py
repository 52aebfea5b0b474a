"""What every answer object and chunk carries around its choices, and server-sent events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from serve.gateway.choices import Piece
from serve.gateway.generation import Generation

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still working\n\n"
"""A comment: clients ignore it, and writing it finds out who has left."""

_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """id, time, model and fingerprint; and which usage a stream tells."""

    id: str
    object: str
    chunk_object: str
    created: int
    model: str
    fingerprint: str
    has_usage: bool = False
    """One usage chunk at the end; the others say `usage: null`."""
    has_running_usage: bool = False
    """Usage so far in every chunk (vLLM's `continuous_usage_stats`)."""

    def answer(self) -> dict[str, Any]:
        return self._fields(self.object)

    def chunk(self) -> dict[str, Any]:
        return self._fields(self.chunk_object)

    def _fields(self, name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Format(Protocol):
    """An endpoint's wire format."""

    def chunks(self, piece: Piece, generation: Generation) -> list[dict[str, Any]]: ...
    def whole(self, pieces: dict[int, list[Piece]], generation: Generation) -> dict[str, Any]: ...


def encode_json(value: Any) -> bytes:
    return _encoder.encode(value)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"
