"""A replica that draws nothing: progress, previews, files and ends in the order an engine gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway_fakes import FakeBackend, card

from serve.errors import InvalidRequest
from serve.events import DenoiseProgress, Event, Finished, FinishReason, ImagePreview, ImageReady, Usage
from serve.request import ImageLimits, ImageRequest, ModelCard

LATENT_TOKENS = 16


def image_card(name: str = "painter", **limits: Any) -> ModelCard:
    values: dict[str, Any] = {
        "width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.5, "size_multiple": 8,
        "max_pixels": 256 * 256, "max_steps": 100, "solvers": ("flow_match_euler", "flow_match_euler_stochastic"),
    }  # fmt: skip
    aliases = (f"{name}-small",)
    return card(name, kind="image", max_model_len=0, aliases=aliases, image=ImageLimits(**{**values, **limits}))


def picture(request: ImageRequest, index: int, step: int) -> bytes:
    """What stands for an encoded image: another one for each seed, step and size."""
    return f"{request.output_format} {request.width}x{request.height} {request.seed + index} {step}".encode()


@dataclass(eq=False)
class FakeImageBackend(FakeBackend):
    """Refuses at its door what its card rules out, like a replica; then step by step, all images together."""

    card: ModelCard = field(default_factory=image_card)
    replica_id: str = "replica-image"
    picture: Callable[[ImageRequest, int, int], bytes] = picture

    @property
    def bundle(self) -> dict[str, bytes]:
        return {}

    async def submit(self, request: Any) -> Any:
        limits = self.card.image
        if request.width % limits.size_multiple:
            raise InvalidRequest(f"width is {request.width}, not a multiple of {limits.size_multiple}", param="width")
        if request.width * request.height > limits.max_pixels:
            raise InvalidRequest(f"size {request.width}x{request.height} is too large; make it smaller", param="size")
        if request.solver not in limits.solvers:
            raise InvalidRequest("scheduler is not one of this model's; use flow_match_euler, say", param="scheduler")
        return await super().submit(request)

    def script(self, request: Any) -> list[list[Event]]:
        num_steps, previews = request.num_inference_steps, request.num_previews
        after = {(number + 1) * num_steps // (previews + 1): number for number in range(previews)}
        missing = [index for index in range(request.n) if index not in request.delivered]
        steps: list[list[Event]] = []
        for step in range(1, num_steps + 1):
            events: list[Event] = []
            for index in missing:
                events.append(DenoiseProgress(index, step, num_steps))
                if step in after and step < num_steps:
                    events.append(ImagePreview(index, after[step], step, self.picture(request, index, step)))
            steps.append(events)
        for index in missing:
            usage = Usage(prompt_tokens=7, completion_tokens=LATENT_TOKENS)
            file = ImageReady(index, self.picture(request, index, num_steps))
            steps.append([file, Finished(index, FinishReason.STOP, usage)])
        return steps
