"""A trajectory: one generation over a latent, and the batch in which it travels to the runner.

Its life is a list of operations that is known from the start; what is scheduled runs ahead of what is settled:

    encode   denoise 0   denoise 1   decode 2 (a preview)   denoise 2   …   decode N (the image)
    0        1           2           3                      4
                         ^ num_done  ^ num_scheduled

A position in this list names a state of the latent: operation p reads state p and leaves state p + 1. So after a
failure a trajectory goes on from its last settled state, and nothing about steps, guidance, solver or prompt has to be
equal among those that share a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from serve.engine.job import Job


class Stage(IntEnum):
    """What an operation computes. The smaller goes first among trajectories that were served equally long ago: a
    newcomer that is encoded joins the next denoise step, a finished image leaves."""

    ENCODE = 0
    DECODE = 1
    DENOISE = 2


class Operation(NamedTuple):
    stage: Stage
    step: int
    """Denoise steps done before it."""


@dataclass(slots=True, eq=False, kw_only=True)
class Trajectory(Job):
    """A prompt, a size, a seed, and how far the latent has come from noise to image. One image of a request."""

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    """Pixels."""
    num_steps: int
    guidance_scale: float
    solver: str
    seed: int
    num_previews: int = 0

    operations: tuple[Operation, ...] = ()
    """Set by `add`, as is `num_tokens`."""
    num_tokens: int = 0
    """Latent tokens of one row."""
    num_prompt_tokens: int = 0
    """Known once it is encoded."""
    num_scheduled: int = 0
    num_done: int = 0
    last_step: int = -1
    """The last engine step that served it; when admitted, the one before."""

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def num_rows(self) -> int:
        """Rows of a denoise step: the prompt's, and the negative prompt's beside it."""
        return 2 if self.is_guided else 1

    @property
    def num_tokens_to_compute(self) -> int:
        """Latent tokens of all its denoise steps."""
        return self.num_steps * self.num_rows * self.num_tokens

    @property
    def num_tokens_owed(self) -> int:
        """Those of the denoise steps that are not settled."""
        if self.num_done == len(self.operations):
            return 0
        return (self.num_steps - self.operations[self.num_done].step) * self.num_rows * self.num_tokens


def plan_operations(num_steps: int, num_previews: int) -> tuple[Operation, ...]:
    """All a trajectory will do, previews spread evenly. There are fewer previews than wanted when steps are few."""
    num_previews = min(num_previews, num_steps - 1)
    previews = {(i + 1) * num_steps // (num_previews + 1) for i in range(num_previews)}
    operations = [Operation(Stage.ENCODE, 0)]
    for step in range(num_steps):
        if step in previews:
            operations.append(Operation(Stage.DECODE, step))
        operations.append(Operation(Stage.DENOISE, step))
    operations.append(Operation(Stage.DECODE, num_steps))
    return tuple(operations)


@dataclass(slots=True)
class Row:
    """One trajectory in one step (in a forward of the transformer it may be two rows: `num_rows`)."""

    job: Trajectory
    epoch: int
    """The job's epoch when scheduled; the output is stale when it has changed since."""
    position: int
    """Of the operation in `job.operations`."""
    num_settled: int
    """States before this one are no longer needed, whatever fails."""

    @property
    def step(self) -> int:
        """Denoise steps done before it."""
        return self.job.operations[self.position].step

    @property
    def precedes_preview(self) -> bool:
        """Whether the next operation shows an estimate, which this denoise step has to leave behind."""
        stage, step = self.job.operations[self.position + 1]
        return stage is Stage.DECODE and step < self.job.num_steps

    @property
    def is_preview(self) -> bool:
        """Of a row to decode: whether it shows the estimate and not the finished latent."""
        return self.step < self.job.num_steps


@dataclass(slots=True)
class ImageBatch:
    """What one step computes: one stage, and for all but the encoding one size."""

    number: int
    kind: Stage
    rows: list[Row] = field(default_factory=list)

    @property
    def jobs(self) -> list[Trajectory]:
        return [row.job for row in self.rows]

    @property
    def stage(self) -> str:
        return self.kind.name.lower()

    @property
    def num_rows(self) -> int:
        """Rows of the forward: texts to encode, latents to predict for or to decode."""
        return sum(num_rows(self.kind, row.job) for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Work: rows × latent tokens."""
        return sum(num_rows(self.kind, row.job) * row.job.num_tokens for row in self.rows)


def num_rows(stage: Stage, job: Trajectory) -> int:
    """What a trajectory adds to a forward of that stage."""
    return 1 if stage is Stage.DECODE else job.num_rows


@dataclass(slots=True)
class ImageOutput:
    """One entry per row of the batch, in order; a denoise step only says that it was computed."""

    num_prompt_tokens: list[int] = field(default_factory=list)
    """Of an encoding."""
    pixels: list[bytes] = field(default_factory=list)
    """Of a decoding: RGB, a byte each, row by row."""


@dataclass(slots=True)
class TrajectoryUpdate:
    """What a step gives one trajectory: the `output` of an engine update."""

    step: int
    """Denoise steps done."""
    pixels: bytes | None = None
    """The image when all steps are done, else a preview. None: the step itself."""
