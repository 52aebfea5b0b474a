"""Requests and answers made by hand, and a target without a network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.measure.outcome import Outcome, Status
from loadtest.targets.target import Failed, Message
from loadtest.traffic.ask import Ask, ImageAsk, TextAsk


def text_ask(**fields: Any) -> TextAsk:
    return TextAsk(**{"prompt": "hello", "num_prompt": 10, "num_output": 4, **fields})


def image_ask(**fields: Any) -> ImageAsk:
    return ImageAsk(**{"prompt": "a star", "width": 8, "height": 8, "num_steps": 5, "seed": 1, **fields})


def answered(scheduled: float, contents: Sequence[float], end: float, ask: Ask | None = None, **fields: Any) -> Outcome:
    """A request that came to its end; sent when it was due unless `sent` is given."""
    made = Outcome(0, ask or text_ask(), scheduled, sent=fields.pop("sent", scheduled), end=end, status=Status.OK)
    made.contents = list(contents)
    made.prompt_tokens, made.output_tokens = fields.pop("tokens", (10, len(contents)))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@dataclass
class FakeTarget:
    """Answers each request after `seconds`, with two pieces."""

    seconds: Callable[[Ask], float] = lambda ask: 0.0
    failure: Callable[[int], Failed | None] = lambda number: None
    sent: list[Ask] = field(default_factory=list)
    histories: list[Sequence[Message]] = field(default_factory=list)
    most_at_once: int = 0
    num_left: int = 0
    _now: int = 0

    def prepare(self, ask: Ask, history: Sequence[Message] = ()) -> Ask:
        self.histories.append(list(history))
        return ask

    async def send(self, prepared: Ask, outcome: Outcome, origin: float) -> None:
        self.sent.append(prepared)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            if (failure := self.failure(len(self.sent))) is not None:
                raise failure
            await asyncio.sleep(self.seconds(prepared))
            outcome.contents = [time.perf_counter() - origin] * 2
            outcome.text = ["one", " two"]
            outcome.prompt_tokens, outcome.output_tokens = 10, 4
            outcome.end = time.perf_counter() - origin
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        finally:
            self._now -= 1

    async def count_tokens(self, text: str) -> int:
        return len(text.split())

    async def is_there(self) -> bool:
        return True

    async def queue_seconds(self) -> dict[str, float] | None:
        return None

    async def aclose(self) -> None: ...
