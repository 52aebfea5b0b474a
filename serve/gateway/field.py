"""What one request field is: who defined it, what becomes of it, its type. The tables are beside: `fields.py`.

A field is *honoured*; or *accepted*: without effect by its own definition (`user`, `metadata`); or *refused* with the
reason, except for the values that ask for nothing (`tools: []`, `best_of: 1`). A name that is in no table is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

CHAT, COMPLETIONS, IMAGES = "chat", "completions", "images"
PATHS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions", IMAGES: "/v1/images/generations"}
"""The endpoints that have a table."""


class Use(StrEnum):
    """What becomes of a field."""

    HONOURED = "honoured"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One request field on one or more endpoints."""

    name: str
    origin: str
    """"openai", "vllm" (vLLM and vLLM-Omni) or "tandem"."""
    on: tuple[str, ...]
    use: Use
    note: str
    """What it does here; for a refused field the reason."""
    type: Any = None
    """A pydantic annotation. None for refused fields."""
    example: Any = None
    """A valid value that is not the default; docs show it, tests send it."""
    harmless: tuple[Any, ...] = field(default=())
    """Values of a refused field that ask for nothing, null apart."""


def honoured(name: str, type: Any, note: str, example: Any, *, on: tuple[str, ...], by: str = "openai") -> Field:
    return Field(name=name, origin=by, on=on, use=Use.HONOURED, note=note, type=type, example=example)


def accepted(name: str, type: Any, note: str, example: Any, *, on: tuple[str, ...], by: str = "openai") -> Field:
    return Field(name=name, origin=by, on=on, use=Use.ACCEPTED, note=note, type=type, example=example)


def refused(name: str, note: str, *harmless: Any, on: tuple[str, ...], by: str = "openai") -> Field:
    return Field(name=name, origin=by, on=on, use=Use.REFUSED, note=note, harmless=harmless)
