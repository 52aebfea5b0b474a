"""The contract between the engine loop and a modality: a `Scheduler` that decides and a `Runner` that computes.

The engine moves jobs through the two and knows neither tokens nor latents. What must hold for every pair, and is tested
as properties over random schedules:

- progress      while a job is unfinished and nothing is in flight, `schedule()` returns a batch; what can never fit is
                refused by `validate`
- budget        a batch never exceeds the scheduler's limits on work and on jobs
- conservation  free + held resources = total after every step; all free when no job is left
- once          every job finishes exactly once
- transparency  a job's outputs do not depend on its batch mates, chunking, cache reuse or preemption
- fairness      admission follows the policy key, and every running job advances within a bounded number of steps

Steps may overlap (`Engine` depth): `schedule` can be called again before the previous batch's `update`. Each batch is
settled exactly once, by `update` or by `abandon`, in the order of scheduling. Resources that a batch in flight may
still write are freed only when that batch is settled. A job that was removed or preempted meanwhile gets nothing
from it: every batch remembers the epoch of its jobs, stale outputs are dropped.

A batch that fails (its `submit` or `collect` raised) is abandoned. Its jobs stay with the scheduler and are tried again
alone, one after the other, with nothing else in flight; who fails alone is removed, who yields an output is cleared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from serve.backend import Load
from serve.engine.job import Job
from serve.errors import TandemError
from serve.events import FinishReason

J = TypeVar("J", bound=Job)
B = TypeVar("B", bound="Batch")
B_co = TypeVar("B_co", bound="Batch", covariant=True)
B_contra = TypeVar("B_contra", contravariant=True)
O_contra = TypeVar("O_contra", contravariant=True)
O_co = TypeVar("O_co", covariant=True)


class Batch(Protocol):
    """What one step computes. Plain integers, so that it can be sent to other ranks as it is."""

    @property
    def jobs(self) -> list[Any]:
        """The jobs in this batch (`Job`)."""
        ...

    @property
    def num_tokens(self) -> int:
        """Token positions (or latent tokens) computed in this step."""
        ...

    @property
    def stage(self) -> str:
        """What kind of step this is, for metrics; empty where there is only one kind."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the computation: a job may need several."""
        ...


@dataclass(slots=True)
class Update(Generic[J]):
    """What a settled batch means for one job: an output to publish, a finish, or both."""

    job: J
    output: Any | None = None
    finish: FinishReason | None = None
    error: TandemError | None = None
    """With `FinishReason.ERROR`: why this job alone cannot go on."""


class Scheduler(Protocol[J, B, O_contra]):
    """Decides what the next step computes. Owns queues, budgets and resource ids. No torch, no clock, no threads."""

    def validate(self, job: J) -> None:
        """Raise `InvalidRequest` for what can never run. Pure: called on the submitter's thread."""
        ...

    def add(self, job: J) -> None:
        """Take a new job. `job.arrival` is set."""
        ...

    def remove(self, job: J) -> None:
        """Forget a job, waiting or running: raise its epoch, free its resources (those in flight when settled)."""
        ...

    def schedule(self, only: J | None = None) -> B | None:
        """The next batch, never an empty one, or None when nothing can be computed before one in flight is settled.

        `only`: a batch with that job alone, whoever else is waiting or running; asked for when nothing is in flight,
        and always possible then (others are preempted if their resources are needed).
        """
        ...

    def update(self, batch: B, output: O_contra) -> Iterable[Update[J]]:
        """Settle a computed batch: what it means for its jobs, stale ones left out.

        A finished job has been removed when its update is given. An update without output and finish may be left out.
        """
        ...

    def abandon(self, batch: B) -> None:
        """Settle a batch that failed: its jobs lose what it would have computed and are scheduled for it again.

        Raises the epoch of those for whom the batch was not stale yet, so that later batches in flight, which may build
        on its outputs, give them nothing.
        """
        ...

    def load(self) -> Load:
        """Called after every step: O(1), from counters."""
        ...


class Runner(Protocol[B_contra, O_co]):
    """Computes batches. Owns weights, tensors and the device; decides nothing. Called by the engine thread only."""

    def submit(self, batch: B_contra) -> Any:
        """Start computing and return a handle. May block (CPU) or return at once (GPU)."""
        ...

    def collect(self, handle: Any) -> O_co:
        """Wait for the result of a submitted batch. Called in the order of submission, once per handle."""
        ...

    def release(self, job_id: str) -> None:
        """Drop tensors kept for this job, if any. Called once per job, when no batch in flight contains it."""
        ...

    def check(self) -> None:
        """Canary: compute something small with a known answer; raise when the device can no longer be trusted.

        Called when a job has been convicted, and periodically while there is nothing to do. Touches nothing of any job.
        """
        ...


class DeviceFault(Exception):
    """Raised by a runner when the device itself is lost (a CUDA error, say): the engine ends, nothing is retried."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """One settled step, for metrics."""

    duration_s: float
    """From submit to settled."""
    num_jobs: int
    num_tokens: int
    stage: str = ""
    """Of the batch; empty where there is only one kind of step."""
    num_rows: int = 0


class Pace(Protocol):
    """Measures how fast the engine is and predicts from that what a load means in seconds. Told on the engine's thread,
    asked (`cost_s`) on any; must be quick."""

    def on_step(self, batch: Any, step_s: float) -> None:
        """A batch was settled, and kept the device for `step_s`: time behind an earlier batch is not counted."""
        ...

    def on_finish(self, job: Any) -> None:
        """A job ended, whatever its `finish_reason`."""
        ...

    def cost_s(self, job: Any) -> float:
        """What a job that the scheduler has not seen yet will add to the backlog."""
        ...

    def predict(self, load: Load) -> Load:
        """The scheduler's load with the predictions filled in."""
        ...


class Observer(Protocol):
    """Receives what happened, on the engine thread. Must be quick; its failure never fails a job. States, as the load,
    are not told but asked for (`Engine.load`)."""

    def on_step(self, stats: StepStats) -> None:
        """A batch was settled."""
        ...

    def on_finish(self, job: Job) -> None:
        """A job ended, whatever its `finish_reason`."""
        ...

    def on_canary(self, duration_s: float) -> None:
        """The runner has proved itself while there was nothing to do."""
        ...
