"""JSON and server-sent events as bytes, and how large files get into them."""

from __future__ import annotations

import asyncio
import binascii
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still working\n\n"
"""A comment: clients ignore it, and writing it finds out who has left."""
BASE64_BYTES = 192 << 10
"""Encoded at once, a multiple of 3: 0.4 ms of this event loop (500 MB/s on one 2.6 GHz core)."""

_encoder = msgspec.json.Encoder()


def encode_json(value: Any) -> bytes:
    return _encoder.encode(value)


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _encoder.encode(value) + b"\n\n"


async def base64_json(data: bytes) -> msgspec.Raw:
    """A file as a JSON string. Others get their turn between its parts; a thread would hold the interpreter's lock."""
    parts = [b'"']
    for start in range(0, len(data), BASE64_BYTES):
        if start:
            await asyncio.sleep(0)
        parts.append(binascii.b2a_base64(data[start : start + BASE64_BYTES], newline=False))
    parts.append(b'"')
    return msgspec.Raw(b"".join(parts))
