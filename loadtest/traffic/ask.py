"""What one request of a load asks for, before anybody knows by which protocol it will be asked. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAsk:
    """Continue `prompt` by `num_output` tokens."""

    prompt: str
    num_prompt: int
    """Tokens `prompt` was made for; the server's usage tells what it came to."""
    num_output: int
    seed: int = 0
    group: str = "text"
    """Figures are told per group: text, image, probe."""
    cancel_after_s: float | None = None
    """Leave so long after sending; None: stay to the end."""
    follow_up: TextAsk | None = None
    """The next turn of the conversation, asked `think_s` after this one's answer, behind both."""
    think_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageAsk:
    """Draw `prompt`. What is None is left to the server."""

    prompt: str
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    num_images: int = 1
    num_previews: int = 0
    negative_prompt: str | None = None
    group: str = "image"
    cancel_after_s: float | None = None
    deadline_s: float | None = None
    """A trace's own limit for this request's latency, beside those of the whole group."""


Ask = TextAsk | ImageAsk
