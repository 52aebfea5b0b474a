"""One request's way through the fleet, and what a client saw of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from serve.request import SamplingParams, TextRequest


@dataclass(slots=True, eq=False)
class Visit:
    """Times are the world's. It ends once: with `ended_s`, or refused."""

    request: TextRequest
    num_output: int
    arrived_s: float
    first_s: float | None = None
    """When the client had its first token, and, below, its last."""
    ended_s: float | None = None
    is_refused: bool = False
    num_cached: int = 0
    replica_id: str = ""
    gateway: int = 0
    num_ends: int = 0
    """How often it was told to be over: 1, or the simulator is wrong."""

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """Between two tokens on average; 0 for a single one."""
        assert self.first_s is not None and self.ended_s is not None
        return (self.ended_s - self.first_s) / (self.num_output - 1) if self.num_output > 1 else 0.0

    def first(self, now: float) -> None:
        if self.first_s is None:
            self.first_s = now

    def end(self, now: float) -> None:
        self.ended_s = now
        self.num_ends += 1

    def refuse(self, now: float) -> None:
        self.is_refused = True
        self.end(now)


def visit_of(number: int, at_s: float, num_prompt: int, num_output: int) -> Visit:
    """A prompt that shares no block with any other of the first half million."""
    first = 4096 * number
    return visit_with(f"r{number}", at_s, range(first, first + num_prompt), num_output)


def visit_with(request_id: str, at_s: float, token_ids: Sequence[int], num_output: int) -> Visit:
    """`token_ids` may be a range: simulated requests stay in this process."""
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    request = TextRequest(
        request_id=request_id, model="paced", prompt_token_ids=cast(Any, token_ids), sampling=sampling
    )
    return Visit(request, num_output, at_s)
