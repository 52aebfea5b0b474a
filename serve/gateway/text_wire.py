"""What chat and completions share on the wire: the envelope around choices, and how steps become events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from serve.gateway.choices import Piece
from serve.gateway.errors import error_event
from serve.gateway.text_generation import TextGeneration
from serve.gateway.usage import usage
from serve.gateway.wire import DONE, encode_json, event


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


class Choices(Protocol):
    """An endpoint's objects: where chat and completions differ."""

    def chunks(self, piece: Piece, generation: TextGeneration) -> list[dict[str, Any]]: ...
    def whole(self, pieces: dict[int, list[Piece]], generation: TextGeneration) -> dict[str, Any]: ...


class TextFormat:
    """Pieces of text as bytes: chunks, usage, [DONE]; or one object."""

    def __init__(self, choices: Choices, envelope: Envelope, generation: TextGeneration) -> None:
        self._choices = choices
        self._envelope = envelope
        self._generation = generation

    async def events(self, pieces: list[Piece]) -> list[bytes]:
        chunks = [chunk for piece in pieces for chunk in self._choices.chunks(piece, self._generation)]
        if self._envelope.has_running_usage:
            so_far = usage(self._generation.tokens())
            chunks = [{**chunk, "usage": so_far} for chunk in chunks]
        elif self._envelope.has_usage:
            chunks = [{**chunk, "usage": None} for chunk in chunks]
        return [b"".join(map(event, chunks))] if chunks else []

    def ending(self) -> bytes:
        if not self._envelope.has_usage:
            return DONE
        last = {**self._envelope.chunk(), "choices": [], "usage": usage(self._generation.tokens())}
        return event(last) + DONE

    def failure(self, error: BaseException) -> bytes:
        return error_event(error)

    async def whole(self, pieces: list[Piece]) -> list[bytes]:
        by_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_choice.setdefault(piece.index, []).append(piece)
        return [encode_json(self._choices.whole(by_choice, self._generation))]
