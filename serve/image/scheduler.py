"""Decides which trajectories take their next operation together. Owns queues, slots and the cap on work.

Continuous batching at the level of steps: whoever needs the same stage (and, but for encoding, the same size, as only
shapes must agree in a forward) goes together, whatever the prompt, seed, number of steps, guidance or solver. A step
is made of

1. admission: while a slot is free, the first of the queue gets it and stands behind those who run;
2. the head: who was served longest ago; among equals encoding goes before decoding before denoising, so that a
   newcomer takes part in the next denoise step and a finished image is not kept;
3. its group, longest not served first, as far as the cap on work goes: rows × latent tokens. Images are of very
   different sizes, so their number says little. The head itself always fits, be it larger than the cap.

Every step serves the head, and who is served or new stands behind all who wait, so nobody waits more steps than there
are running trajectories. There is no preemption: to leave a trajectory out costs nothing but its latent, and the slots
bound those. Steps may overlap: operations are known beforehand, epochs make what is in flight for a removed or failed
trajectory stale, and its slot stays taken until the last step that writes its tensors is settled.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.backend import Load
from serve.engine.interface import Update
from serve.engine.job import Job, Status
from serve.engine.waiting import WaitingQueue, aged_priority
from serve.events import FinishReason
from serve.image.limits import Limits
from serve.image.trajectory import (
    ImageBatch,
    ImageOutput,
    Row,
    Stage,
    Trajectory,
    TrajectoryUpdate,
    num_rows,
    plan_operations,
)


class ImageScheduler:
    """A `Scheduler` over trajectories. `num_tokens` tells the latent tokens of an image from its width and height."""

    def __init__(
        self,
        limits: Limits,
        num_tokens: Callable[[int, int], int],
        *,
        max_num_images: int,
        max_num_batched_tokens: int,
        policy: Callable[[Job], float] = aged_priority,
    ):
        if min(max_num_images, max_num_batched_tokens) < 1:
            raise ValueError(
                f"max_num_images is {max_num_images} and max_num_batched_tokens {max_num_batched_tokens}; "
                "both must be at least 1"
            )
        self.max_num_images = max_num_images
        self.max_num_batched_tokens = max_num_batched_tokens

        self._limits = limits
        self.num_tokens = num_tokens
        self._waiting: WaitingQueue[Trajectory] = WaitingQueue(policy)
        self._running: dict[Trajectory, None] = {}
        """Longest not served first; those of one step in their order before it, so that who leads changes."""
        self._num_tokens_waiting = 0
        self._num_tokens_owed = 0
        """Latent tokens of all denoise steps that are not settled."""

        self._number = 0
        """Of the next batch."""
        self._settled = -1
        self._leaving: dict[int, int] = {}
        """Number of a batch in flight → slots that come free when it is settled."""

    # -- jobs ------------------------------------------------------------------------------------------------------

    def validate(self, job: Trajectory) -> None:
        self._limits.check(job)

    def add(self, job: Trajectory) -> None:
        job.operations = plan_operations(job.num_steps, job.num_previews)
        job.num_tokens = self.num_tokens(job.width, job.height)
        self._num_tokens_waiting += job.num_tokens_to_compute
        self._num_tokens_owed += job.num_tokens_owed
        self._waiting.add(job)

    def remove(self, job: Trajectory) -> None:
        if job in self._running:
            self._release(job)
        elif self._waiting.remove(job):
            self._num_tokens_waiting -= job.num_tokens_to_compute
            self._num_tokens_owed -= job.num_tokens_owed
            job.epoch += 1

    def load(self) -> Load:
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            tokens_waiting=self._num_tokens_waiting,
            memory=min(1.0, self._num_taken / self.max_num_images),
            tokens_owed=self._num_tokens_owed,
        )

    # -- the next step ---------------------------------------------------------------------------------------------

    def schedule(self, only: Trajectory | None = None) -> ImageBatch | None:
        if only is None:
            while self._num_taken < self.max_num_images and self._waiting:
                self._admit(self._waiting.pop())
            able = [job for job in self._running if job.num_scheduled < len(job.operations)]
            able.sort(key=_turn)
        else:
            if self._waiting.remove(only):
                self._admit(only)  # beyond the slots, if need be: only who has run is ever tried alone
            able = [only]
        if not able:
            return None
        group = _group(able[0])
        batch = ImageBatch(self._number, group[0])
        left = self.max_num_batched_tokens
        for job in able:
            if _group(job) != group:
                continue
            work = num_rows(batch.kind, job) * job.num_tokens
            if batch.rows and work > left:
                continue
            left -= work
            batch.rows.append(Row(job, job.epoch, job.num_scheduled, job.num_done))
            job.num_scheduled += 1
            job.last_step = batch.number
            del self._running[job]
            self._running[job] = None
        self._number += 1
        return batch

    @property
    def _num_taken(self) -> int:
        return len(self._running) + sum(self._leaving.values())

    def _admit(self, job: Trajectory) -> None:
        self._num_tokens_waiting -= job.num_tokens_to_compute
        job.status = Status.RUNNING
        job.last_step = self._number - 1
        self._running[job] = None

    def _release(self, job: Trajectory) -> None:
        """Take a running trajectory's slot away. What is in flight for it is stale from now on."""
        del self._running[job]
        self._num_tokens_owed -= job.num_tokens_owed
        job.epoch += 1
        if job.last_step > self._settled:
            self._leaving[job.last_step] = self._leaving.get(job.last_step, 0) + 1

    # -- settling --------------------------------------------------------------------------------------------------

    def update(self, batch: ImageBatch, output: ImageOutput) -> list[Update[Trajectory]]:
        updates: list[Update[Trajectory]] = []
        for i, row in enumerate(batch.rows):
            job = row.job
            if job.epoch != row.epoch:
                continue
            job.num_done = row.position + 1
            if batch.kind is Stage.ENCODE:
                job.num_prompt_tokens = output.num_prompt_tokens[i]
            elif batch.kind is Stage.DENOISE:
                self._num_tokens_owed -= job.num_rows * job.num_tokens
                updates.append(Update(job, TrajectoryUpdate(row.step + 1)))
            else:
                finish = None if row.is_preview else FinishReason.STOP
                if finish is not None:
                    self._release(job)
                updates.append(Update(job, TrajectoryUpdate(row.step, output.pixels[i]), finish))
        self._settle(batch)
        return updates

    def abandon(self, batch: ImageBatch) -> None:
        """What was settled before this batch stays; later batches in flight are stale for its trajectories."""
        for row in batch.rows:
            job = row.job
            if job.epoch == row.epoch:
                job.epoch += 1
                job.num_scheduled = job.num_done
        self._settle(batch)

    def _settle(self, batch: ImageBatch) -> None:
        self._settled = batch.number
        self._leaving.pop(batch.number, None)


def _turn(job: Trajectory) -> tuple[int, Stage]:
    return job.last_step, job.operations[job.num_scheduled].stage


def _group(job: Trajectory) -> tuple[Stage, int, int]:
    """What must be equal within a batch: the shapes."""
    stage = job.operations[job.num_scheduled].stage
    return (stage, 0, 0) if stage is Stage.ENCODE else (stage, job.width, job.height)
