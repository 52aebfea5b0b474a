"""One request as its client saw it, and the times that follow from that. Seconds throughout.

    scheduled   sent     first content    content ... content   end
        |---lag---|                |          |          |       |
        |-----------ttft-----------|----itl---|---itl----|       |
        |------------------------- e2e --------------------------|

Everything counts from `scheduled`, when the request was due: a client or a server that cannot keep up must not make
its own latency smaller by asking later (coordinated omission). In a closed loop a request is due when it is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loadtest.traffic.ask import Ask, ImageAsk


class Status(StrEnum):
    """How a request ended, for its client."""

    OK = "ok"
    REJECTED = "rejected"
    """429: the server said not now."""
    TIMEOUT = "timeout"
    """Not answered within the client's limit."""
    ERROR = "error"
    CANCELLED = "cancelled"
    """Left on purpose. Neither good nor bad."""
    UNFINISHED = "unfinished"
    """Cut off by the end of the run."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished image, kept aside until the run is over: decoding it meanwhile would disturb the clock."""

    offset: int
    size_bytes: int


@dataclass(slots=True)
class Outcome:
    """Filled in as the answer comes. Times are seconds from the start of the run."""

    index: int
    ask: Ask
    scheduled: float
    sent: float = 0.0
    end: float = 0.0
    """Of the last byte."""
    status: Status = Status.UNFINISHED
    error: str = ""
    """Class of the failure, the same for all failures of a kind."""
    contents: list[float] = field(default_factory=list)
    """When each piece of output came. A piece may hold several tokens."""
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    """From the server's usage."""
    cached_tokens: int = 0
    num_tokenized: int | None = None
    """Tokens of prompt or messages by the checking tokenizer, where it was asked."""
    previews: list[float] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    num_steps: int | None = None
    """Denoise steps an image took, asked or told by the server."""
    size: tuple[int, int] | None = None
    """Of an image: asked, or told by the server."""
    flaw: str = ""
    """What is wrong with the content of an answer that came; empty: nothing known."""

    @property
    def group(self) -> str:
        return self.ask.group

    @property
    def is_ok(self) -> bool:
        return self.status is Status.OK

    @property
    def lag(self) -> float:
        """How late it was sent: the client's own delay, and its wait for a free place under `--max-concurrency`."""
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float | None:
        """To the first non-empty piece of content."""
        return self.contents[0] - self.scheduled if self.contents else None

    @property
    def itls(self) -> list[float]:
        """The gaps between pieces of content."""
        return [after - before for before, after in zip(self.contents, self.contents[1:])]

    @property
    def tpot(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1); of a single token there is none."""
        return (self.end - self.contents[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def e2e(self) -> float:
        return self.end - self.scheduled

    @property
    def ttfp(self) -> float | None:
        """To the first preview of an image."""
        return self.previews[0] - self.scheduled if self.previews else None

    @property
    def megapixel_steps(self) -> float:
        """Width x height x steps of all its images, in millions: the work of a diffusion model, whatever the sizes."""
        if self.size is None or not self.num_steps:
            return 0.0
        return self.size[0] * self.size[1] * self.num_steps * len(self.pictures) / 1e6

    def row(self) -> dict[str, Any]:
        """For the raw file, a JSON object a request."""
        told: dict[str, Any] = {
            "index": self.index,
            "group": self.group,
            "status": str(self.status),
            "scheduled": _us(self.scheduled),
            "start_time": _us(self.sent),
            "latency": _us(self.e2e),
            "lag": _us(self.lag),
        }
        if self.error:
            told["error"] = self.error
        if self.flaw:
            told["flaw"] = self.flaw
        if isinstance(self.ask, ImageAsk):
            told |= {"size": self.size, "steps": self.num_steps, "images": len(self.pictures), "seed": self.ask.seed}
            told["previews"] = [_us(at - self.scheduled) for at in self.previews]
            return told
        told |= {"prompt_len": self.prompt_tokens, "output_tokens": self.output_tokens, "asked": self.ask.num_output}
        told |= {"cached_tokens": self.cached_tokens, "ttft": None if self.ttft is None else _us(self.ttft)}
        return told | {"itl": [_us(gap) for gap in self.itls]}


def _us(seconds: float) -> float:
    """To the microsecond: finer is noise, and files stay small."""
    return round(seconds, 6)
