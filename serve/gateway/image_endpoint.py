"""`/v1/images/generations`: from a checked body to a request with every value concrete.

A value is the request's own, else the model's. What only the replica can judge (its sizes, steps, solvers, class names)
it refuses at its door, before the answer begins.
"""

from __future__ import annotations

import secrets
import uuid
from typing import Any

from serve.errors import InvalidRequest, RequestFailed
from serve.gateway.image_generation import ImageGeneration, ImagePiece, Names
from serve.gateway.image_wire import ImageFormat, Shown
from serve.gateway.meters import ImageMeter
from serve.gateway.pool import Pool
from serve.gateway.prepared import Prepared
from serve.gateway.service import Caller
from serve.recorder import Recorder
from serve.request import ImageRequest, ModelCard

SEED_BITS = 32
"""Of a drawn seed: every JSON reader keeps it exact, and other tools take it."""


class ImageEndpoint:
    """Prepares image requests."""

    kind = "image"

    def __init__(self, pool: Pool, recorder: Recorder) -> None:
        self._pool = pool
        self._recorder = recorder

    async def prepare(self, body: Any, card: ModelCard, caller: Caller) -> Prepared[ImagePiece]:
        request = plan(body, card, caller)
        shown = Shown(
            id="img-" + (body.request_id or caller.context.request_id),
            model=body.model or card.name,
            has_progress=bool(body.stream_progress),
            safety_identifier=body.safety_identifier or body.user,
        )
        caller.context.response_id = shown.id
        return Prepared(
            ImageGeneration(request, self._pool.submit, _names(body)),
            ImageFormat(request, shown),
            ImageMeter(self._recorder, card, caller.context, request),
        )


def plan(body: Any, card: ModelCard, caller: Caller) -> ImageRequest:
    """What to submit. Raises InvalidRequest."""
    limits = card.image
    if limits is None:
        raise RequestFailed(f"{card.name} does not tell its limits; its replica is broken")
    _check(body)
    width, height = _size(body) or (limits.width, limits.height)
    return ImageRequest(
        request_id=uuid.uuid4().hex,
        model=card.name,
        prompt=body.prompt,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps or limits.num_inference_steps,
        guidance_scale=body.guidance_scale if body.guidance_scale is not None else limits.guidance_scale,
        solver=body.scheduler or limits.solvers[0],
        seed=body.seed if body.seed is not None else secrets.randbits(SEED_BITS),
        negative_prompt=body.negative_prompt or "",
        n=body.n or 1,
        num_previews=body.partial_images or 0,
        output_format=body.output_format or "png",
        output_compression=body.output_compression if body.output_compression is not None else 100,
        priority=-(body.priority or 0),
        timeout_s=caller.timeout_s,
        session=body.user or "",
        traceparent=caller.context.traceparent,
        tracestate=caller.context.tracestate,
    )


def _check(body: Any) -> None:
    if not body.stream:
        for name in ("partial_images", "stream_progress"):
            if getattr(body, name):
                raise InvalidRequest(f"{name} needs stream: true", param=name)
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise InvalidRequest(
            f"output_compression is {body.output_compression}, but png has no loss; leave it out, or set output_format "
            "to jpeg or webp",
            param="output_compression",
        )


def _size(body: Any) -> tuple[int, int] | None:
    """(width, height) as asked for; None when the model is to choose. Raises InvalidRequest."""
    if (body.width is None) != (body.height is None):
        given, missing = ("width", "height") if body.height is None else ("height", "width")
        raise InvalidRequest(f"{given} needs {missing}; give both, or size", param=missing)
    if body.width is None:
        return body.size
    if body.size not in (None, (body.width, body.height)):
        raise InvalidRequest(
            f"size is {body.size[0]}x{body.size[1]} and width and height are {body.width} and {body.height}; "
            "give one of them",
            param="size",
        )
    return body.width, body.height


def _names(body: Any) -> Names:
    """Size is said in two ways; a refusal names the one that was used."""
    return {"width": "size", "height": "size"} if body.width is None else {"size": "width"}
