"""`/v1/images/generations`: OpenAI's wire format, whole and in events, with the values that took effect beside it.

    image_generation.partial_image   a preview                       index, step
    image_generation.progress        only with stream_progress       index, step, num_steps
    image_generation.completed       one image, with its usage       index, seed, steps, guidance, scheduler

The stream ends behind the last completed event; OpenAI sends no [DONE] here. `index` is ours: with `n` above 1 the
images' events come mixed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.events import DenoiseProgress, ImagePreview, Usage
from serve.gateway.errors import error_event
from serve.gateway.image_generation import ImageDone, ImagePiece
from serve.gateway.wire import FILE, encode_json, event, with_files
from serve.request import ImageRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What the client asked to be told."""

    id: str
    model: str
    """As the client named it."""
    has_progress: bool
    safety_identifier: str | None
    """The caller's own, told back as OpenAI does."""


class ImageFormat:
    """Pieces of images as bytes."""

    def __init__(self, request: ImageRequest, shown: Shown) -> None:
        self._request = request
        self._shown = shown
        self._size = f"{request.width}x{request.height}"
        identifier = shown.safety_identifier
        self._identifier = {"safety_identifier": identifier} if identifier else {}

    async def events(self, pieces: list[ImagePiece]) -> list[bytes]:
        return [part for piece in pieces for part in await self._event(piece)]

    def ending(self) -> bytes:
        return b""

    def failure(self, error: BaseException) -> bytes:
        return error_event(error, "error")

    async def whole(self, pieces: list[ImagePiece]) -> list[bytes]:
        done = sorted((piece for piece in pieces if isinstance(piece, ImageDone)), key=lambda image: image.index)
        data = [{"b64_json": FILE, "seed": self._seed(image.index)} for image in done]
        answer = {
            "id": self._shown.id,
            "created": int(time.time()),
            "model": self._shown.model,
            "data": data,
            "background": "opaque",
            "output_format": self._request.output_format,
            "size": self._size,
            "seed": self._request.seed,
            **self._effective(),
            **self._identifier,
            "usage": image_usage([image.usage for image in done]),
        }
        return await with_files(encode_json(answer), [image.data for image in done])

    async def _event(self, piece: ImagePiece) -> list[bytes]:
        told: dict[str, Any]
        match piece:
            case DenoiseProgress(index, step, num_steps):
                told = {"index": index, "step": step, "num_steps": num_steps}
                return [_named("progress", told)] if self._shown.has_progress else []
            case ImagePreview(index, number, step, data):
                told = {**self._picture(), "partial_image_index": number, "index": index, "step": step}
                return await with_files(_named("partial_image", told), [data])
            case ImageDone(index, data, used):
                told = {**self._picture(), **self._identifier, "usage": image_usage([used])}
                told |= {"index": index, "seed": self._seed(index), **self._effective()}
                return await with_files(_named("completed", told), [data])

    def _picture(self) -> dict[str, Any]:
        """What both of OpenAI's events carry."""
        return {
            "b64_json": FILE,
            "created_at": int(time.time()),
            "size": self._size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._request.output_format,
        }

    def _effective(self) -> dict[str, Any]:
        """What a client has to send, with the seed, to get the same image again."""
        return {
            "num_inference_steps": self._request.num_inference_steps,
            "guidance_scale": self._request.guidance_scale,
            "scheduler": self._request.solver,
            "output_compression": self._request.output_compression,
        }

    def _seed(self, index: int) -> int:
        return self._request.seed + index


def image_usage(used: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's usage. Images of one request share its prompt, which counts once."""
    prompt = max((usage.prompt_tokens for usage in used), default=0)
    output = sum(usage.completion_tokens for usage in used)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": prompt},
        "output_tokens": output,
        "output_tokens_details": {"image_tokens": output, "text_tokens": 0},
        "total_tokens": prompt + output,
    }


def _named(name: str, fields: dict[str, Any]) -> bytes:
    kind = f"image_generation.{name}"
    return event({"type": kind, **fields}, kind)
