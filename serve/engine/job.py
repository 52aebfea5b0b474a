"""A job: one generation in progress. What `Sequence` (over tokens) and `Trajectory` (over a latent) have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from serve.events import FinishReason


class Status(IntEnum):
    """WAITING → RUNNING → FINISHED. Preemption goes back to WAITING."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """Identity, urgency and life cycle. Mutable, never leaves its engine. Times are the engine's clock."""

    id: str
    """Unique in its engine and never used again."""
    priority: int = 0
    """Larger is more urgent."""
    timeout_s: float | None = None
    traceparent: str = ""
    tracestate: str = ""
    """The span that its life is part of, as the W3C writes it; empty: nobody traces it."""

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    epoch: int = 0
    """Raised by the scheduler when it preempts, removes or abandons; outputs for an older epoch are dropped."""

    arrival: float = 0.0
    first_scheduled: float | None = None
    first_output: float | None = None
    cancelled: float | None = None
    """When its cancellation was asked for."""
    finished: float | None = None
    stages: list[tuple[str, float]] = field(default_factory=list)
    """Of a job that is traced and has more than one kind of step: which kind began when, in turns."""

    @property
    def deadline(self) -> float | None:
        return None if self.timeout_s is None else self.arrival + self.timeout_s

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def enter(self, stage: str, now: float) -> None:
        """A step of that kind begins."""
        if self.traceparent and not (self.stages and self.stages[-1][0] == stage):
            self.stages.append((stage, now))
