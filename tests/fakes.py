"""Fakes with behaviour: a clock, an observer, a token-like and a denoise-like scheduler, and the devices they run on.

The two schedulers are the shortest that keep the engine's contract, one for each kind of resource: cells that grow with
every token and are taken away by preemption, and latents of constant size that share a batch only when shapes agree.

The devices compute numbers instead of tensors. A token depends on every cell its sequence has written, so a block that
was freed too early, shared wrongly or not recomputed changes the output, and `continuation` and `denoised` say what it
should have been. Work happens when it is collected, as late as an asynchronous device may do it. `FakeTokenRunner` runs
the real `TokenScheduler` as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from serve.backend import Load
from serve.engine.interface import StepStats, Update
from serve.engine.job import Job, Status
from serve.engine.waiting import WaitingQueue
from serve.errors import InvalidRequest
from serve.events import FinishReason
from serve.request import SamplingParams
from serve.text.sequence import PENDING, Row, Sequence, TokenBatch, TokenOutput, TokenUpdate

VOCAB = 11
EOS = 0


class FakeClock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class ListObserver:
    """Remembers all it is told."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finished: list[Job] = []
        self.canaries: list[float] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_finish(self, job: Job) -> None:
        self.finished.append(job)

    def on_canary(self, duration_s: float) -> None:
        self.canaries.append(duration_s)


class Saboteur:
    """Makes a fake device fail: at a job's k-th output, when two jobs meet, or once at the n-th batch."""

    def __init__(self, where: str = "collect"):
        self.where = where
        self.poison: dict[str, int] = {}
        """Job id → number of outputs it yields before computing it fails."""
        self.quarrels: set[frozenset[str]] = set()
        self.glitches: set[int] = set()
        """Numbers of batches that fail; not those of one job, which would rightly be convicted."""
        self.error: Callable[[str], Exception] = RuntimeError
        self.num_checks = 0
        self.is_device_lost = False
        self._num_batches = Counter[str]()

    def strike(self, where: str, progress: Iterable[tuple[str, int]]) -> None:
        """`progress`: for every job of the batch, the index of the output it is computing (-1: none yet)."""
        self._num_batches[where] += 1
        if where != self.where:
            return
        progress = list(progress)
        for job_id, index in progress:
            if index >= self.poison.get(job_id, 1 << 30):
                raise self.error(f"{job_id} is poisoned")
        present = {job_id for job_id, _ in progress}
        for pair in self.quarrels:
            if pair <= present:
                raise self.error(f"{sorted(pair)} do not get on")
        if self._num_batches[where] in self.glitches and len(present) > 1:
            raise self.error("a glitch")

    def check(self) -> None:
        self.num_checks += 1
        if self.is_device_lost:
            raise RuntimeError("the canary computes nonsense")


# -- tokens --------------------------------------------------------------------------------------------------------


def sequence(
    job_id: str, prompt: Iterable[int] = (1, 2, 3), max_tokens: int = 8, *, ignore_eos: bool = False, **job: object
) -> Sequence:
    prompt = list(prompt)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    return Sequence(id=job_id, token_ids=prompt, num_prompt=len(prompt), sampling=sampling, **job)  # type: ignore[arg-type]


def continuation(prompt: Iterable[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What `FakeTokenRunner` must give for this prompt, computed without batches, blocks or schedules."""
    state, outputs = 0, list[int]()
    tokens = list(prompt)
    for position in range(len(tokens) + max_tokens - 1):
        state = _extend(state, tokens[position], position)[1]
        if position >= len(tokens) - 1:
            token = state % VOCAB
            if token == EOS and not ignore_eos:
                break
            outputs.append(token)
            tokens.append(token)
    return outputs


def _extend(state: int, token: int, position: int) -> tuple[int, int]:
    """The cell of a position, from all cells before and its token; and the state with that cell."""
    cell = hash((state, token, position))
    return cell, hash((state, cell))


class FakeTokenRunner:
    """A device for `TokenBatch`es. Keeps a number per position, reads all of a sequence's for its next token."""

    def __init__(self, block_size: int = 1, saboteur: Saboteur | None = None):
        self.block_size = block_size
        self.saboteur = saboteur or Saboteur()
        self.cells: dict[int, int] = {}
        self.sampled: dict[str, int] = {}
        self.in_flight: list[TokenBatch] = []

    def submit(self, batch: TokenBatch) -> TokenBatch:
        self.saboteur.strike("submit", self._progress(batch))
        touched = {
            cell: (row.job.id, row.epoch)
            for other in self.in_flight
            for row in other.rows
            for cell in self._cells(row)[row.start :]
        }
        for row in batch.rows:
            for cell in self._cells(row):
                owner = touched.get(cell, (row.job.id, row.epoch))
                assert owner == (row.job.id, row.epoch), f"cell {cell} of {row.job.id} is still written for {owner}"
        self.in_flight.append(batch)
        return batch

    def collect(self, handle: TokenBatch) -> TokenOutput:
        assert self.in_flight.pop(0) is handle, "collected out of order"
        token_ids = [() if (token := self._compute(row)) is None else (token,) for row in handle.rows]
        self.saboteur.strike("collect", self._progress(handle))
        return TokenOutput(token_ids, [None] * len(token_ids), [None] * len(token_ids))

    def release(self, job_id: str) -> None:
        self.sampled.pop(job_id, None)

    def check(self) -> None:
        self.saboteur.check()

    def _compute(self, row: Row) -> int | None:
        state = 0
        cells = self._cells(row)
        for cell in cells[: row.start]:
            state = hash((state, self.cells.get(cell)))
        for position, token in enumerate(row.token_ids, row.start):
            if token == PENDING:
                token = self.sampled[row.job.id]
            self.cells[cells[position]], state = _extend(state, token, position)
        if not row.samples:
            return None
        self.sampled[row.job.id] = state % VOCAB
        return state % VOCAB

    def _cells(self, row: Row) -> list[int]:
        size = self.block_size
        return [row.block_table[p // size] * size + p % size for p in range(row.start + len(row.token_ids))]

    @staticmethod
    def _progress(batch: TokenBatch) -> list[tuple[str, int]]:
        return [(row.job.id, max(row.start + len(row.token_ids) - row.job.num_prompt, -1)) for row in batch.rows]


class FakeTokenScheduler:
    """Chunked prefill, continuous batching and preemption, over cells of one position; no prefix cache."""

    def __init__(self, *, num_cells: int = 40, max_num_seqs: int = 4, max_num_batched_tokens: int = 8):
        self.num_cells = num_cells
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.free = list(range(num_cells))
        self.waiting: WaitingQueue[Sequence] = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._step = 0
        self._settled = 0
        self.dying: dict[int, list[int]] = {}
        """Step → cells that it may still write; free when it is settled."""

    def validate(self, job: Sequence) -> None:
        if job.num_to_compute > self.num_cells:
            raise InvalidRequest(f"{job.num_to_compute} positions do not fit into {self.num_cells} cells")

    def add(self, job: Sequence) -> None:
        self.waiting.add(job)

    def remove(self, job: Sequence) -> None:
        if not self.waiting.remove(job):
            self._release(job)

    def schedule(self, only: Sequence | None = None) -> TokenBatch | None:
        rows: list[Row] = []
        left = self.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        self._step += 1
        if only is not None and only in self.waiting:
            while len(self.free) < len(only.token_ids) or len(self.running) == self.max_num_seqs:
                self._preempt(self.running[-1])
            self._admit(only)
        if only is not None:
            self.running.sort(key=lambda seq: seq is not only)  # first is safe from preemption
        for seq in self.running[:] if only is None else [only]:
            if seq in self.running and left:
                left -= self._grow(seq, left, rows)
        while (
            only is None and left and num_preemptions == self.num_preemptions and len(self.running) < self.max_num_seqs
        ):
            first = self.waiting.peek()
            if first is None or len(self.free) < len(first.token_ids):
                break
            self._admit(first)
            left -= self._grow(first, left, rows)
        return TokenBatch(self._step, rows) if rows else None

    def update(self, batch: TokenBatch, output: TokenOutput) -> Iterable[Update[Sequence]]:
        for row, sampled in zip(batch.rows, output.token_ids, strict=True):
            seq = row.job
            if seq.epoch != row.epoch:
                continue
            seq.num_computed = row.start + len(row.token_ids)
            if not sampled:
                continue
            (token,) = sampled
            seq.num_pending -= 1
            if token == EOS and not seq.sampling.ignore_eos:
                self._release(seq)
                yield Update(seq, None, FinishReason.STOP)
                continue
            seq.token_ids.append(token)
            is_last = seq.num_output == seq.sampling.max_tokens
            if is_last:
                self._release(seq)
            yield Update(seq, TokenUpdate((token,)), FinishReason.LENGTH if is_last else None)
        self._settle(batch)

    def abandon(self, batch: TokenBatch) -> None:
        for row in batch.rows:
            if row.job.epoch == row.epoch:
                row.job.epoch += 1
                row.job.num_scheduled, row.job.num_pending = row.job.num_computed, 0
        self._settle(batch)

    def load(self) -> Load:
        return Load(running=len(self.running), waiting=len(self.waiting), memory=1 - len(self.free) / self.num_cells)

    def _grow(self, seq: Sequence, left: int, rows: list[Row]) -> int:
        """Schedule up to `left` positions of a running sequence; 0 when it has to wait for cells or tokens."""
        start = seq.num_scheduled
        num_known = min(len(seq.token_ids) + seq.num_pending, seq.num_to_compute)
        num_new = min(num_known - start, left)
        while num_new > 0 and len(self.free) < start + num_new - len(seq.blocks):
            if self.dying:
                return 0
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return 0
        if num_new <= 0:
            return 0
        while len(seq.blocks) < start + num_new:
            seq.blocks.append(self.free.pop())
        end = start + num_new
        samples = end == len(seq.token_ids) + seq.num_pending
        ids = seq.token_ids[start:end] if end <= len(seq.token_ids) else [*seq.token_ids[start:], PENDING]
        rows.append(Row(seq, seq.epoch, ids, start, seq.blocks, samples, end))
        seq.num_scheduled = end
        seq.num_pending += samples
        seq.last_step = self._step
        return num_new

    def _admit(self, seq: Sequence) -> None:
        self.waiting.remove(seq)
        self.running.append(seq)
        seq.status = Status.RUNNING

    def _preempt(self, seq: Sequence) -> None:
        self._release(seq)
        self.num_preemptions += 1
        seq.status = Status.WAITING
        self.waiting.add(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        seq.epoch += 1
        (self.dying.setdefault(seq.last_step, []) if seq.last_step > self._settled else self.free).extend(seq.blocks)
        seq.blocks = []
        seq.num_computed = seq.num_scheduled = seq.num_pending = 0

    def _settle(self, batch: TokenBatch) -> None:
        self._settled = batch.step
        self.free += self.dying.pop(batch.step, [])


# -- latents -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False, kw_only=True)
class FakeTrajectory(Job):
    """A generation over a latent: `num_steps` steps, together only with others of its shape."""

    shape: int = 1
    num_steps: int = 4
    num_scheduled: int = 0
    num_done: int = 0
    last_served: int = 0


@dataclass(slots=True)
class DenoiseRow:
    job: FakeTrajectory
    epoch: int
    step: int


@dataclass(slots=True)
class DenoiseBatch:
    number: int
    rows: list[DenoiseRow]

    @property
    def jobs(self) -> list[FakeTrajectory]:
        return [row.job for row in self.rows]

    @property
    def num_tokens(self) -> int:
        return sum(row.job.shape for row in self.rows)

    @property
    def stage(self) -> str:
        return "denoise"

    @property
    def num_rows(self) -> int:
        return len(self.rows)


def denoised(shape: int, num_steps: int) -> list[int]:
    """The latents that a trajectory must show, one per step."""
    latent, outputs = _noise(shape), list[int]()
    for step in range(num_steps):
        latent = hash((latent, step))
        outputs.append(latent)
    return outputs


def _noise(shape: int) -> int:
    return hash((shape, -1))


class FakeDenoiseRunner:
    """A device for `DenoiseBatch`es. Keeps the latents of each job by step until the job is released."""

    def __init__(self, saboteur: Saboteur | None = None):
        self.saboteur = saboteur or Saboteur()
        self.latents: dict[str, dict[int, int]] = {}
        self.in_flight: list[DenoiseBatch] = []

    def submit(self, batch: DenoiseBatch) -> DenoiseBatch:
        self.saboteur.strike("submit", [(row.job.id, row.step) for row in batch.rows])
        self.in_flight.append(batch)
        return batch

    def collect(self, handle: DenoiseBatch) -> list[int]:
        assert self.in_flight.pop(0) is handle, "collected out of order"
        outputs = []
        for row in handle.rows:
            latents = self.latents.setdefault(row.job.id, {0: _noise(row.job.shape)})
            latents[row.step + 1] = hash((latents[row.step], row.step))
            outputs.append(latents[row.step + 1])
        self.saboteur.strike("collect", [(row.job.id, row.step) for row in handle.rows])
        return outputs

    def release(self, job_id: str) -> None:
        self.latents.pop(job_id, None)

    def check(self) -> None:
        self.saboteur.check()


@dataclass
class FakeDenoiseScheduler:
    """Slots for latents. A step serves the trajectory that waited longest, with others of its shape beside it."""

    num_slots: int = 5
    max_batch: int = 3
    waiting: WaitingQueue[FakeTrajectory] = field(default_factory=WaitingQueue)
    running: list[FakeTrajectory] = field(default_factory=list)
    dying: dict[int, int] = field(default_factory=dict)
    """Batch → slots that it may still write."""
    number: int = 0
    settled: int = 0

    def validate(self, job: FakeTrajectory) -> None:
        if job.num_steps < 1:
            raise InvalidRequest(f"num_steps is {job.num_steps}; take at least 1")

    def add(self, job: FakeTrajectory) -> None:
        self.waiting.add(job)

    def remove(self, job: FakeTrajectory) -> None:
        if not self.waiting.remove(job):
            self._release(job)

    def schedule(self, only: FakeTrajectory | None = None) -> DenoiseBatch | None:
        if only is not None and only in self.waiting and self.num_free == 0:
            victim = self.running.pop()  # its latents stay: suspending is free
            victim.epoch += 1
            victim.status = Status.WAITING
            self.waiting.add(victim)
        while self.waiting and self.num_free > 0 and (only is None or only in self.waiting):
            job = only or self.waiting.pop()
            self.waiting.remove(job)
            job.status = Status.RUNNING
            job.last_served = (
                self.number
            )  # a newcomer queues up behind those here, or a stream of them starves the rest
            self.running.append(job)
        able = [job for job in self.running if job.num_scheduled < job.num_steps and only in (None, job)]
        if not able:
            return None
        able.sort(key=lambda job: job.last_served)
        group = [job for job in able if job.shape == able[0].shape][: self.max_batch]
        self.number += 1
        rows = []
        for job in group:
            rows.append(DenoiseRow(job, job.epoch, job.num_scheduled))
            job.num_scheduled += 1
            job.last_served = self.number
        return DenoiseBatch(self.number, rows)

    def update(self, batch: DenoiseBatch, output: list[int]) -> Iterable[Update[FakeTrajectory]]:
        for row, latent in zip(batch.rows, output, strict=True):
            job = row.job
            if job.epoch != row.epoch:
                continue
            job.num_done = row.step + 1
            is_last = job.num_done == job.num_steps
            if is_last:
                self._release(job)
            yield Update(job, latent, FinishReason.STOP if is_last else None)
        self._settle(batch)

    def abandon(self, batch: DenoiseBatch) -> None:
        for row in batch.rows:
            if row.job.epoch == row.epoch:
                row.job.epoch += 1
                row.job.num_scheduled = row.job.num_done
        self._settle(batch)

    def load(self) -> Load:
        return Load(running=len(self.running), waiting=len(self.waiting), memory=1 - self.num_free / self.num_slots)

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self.running) - sum(self.dying.values())

    def _release(self, job: FakeTrajectory) -> None:
        self.running.remove(job)
        job.epoch += 1
        if job.last_served > self.settled:
            self.dying[job.last_served] = self.dying.get(job.last_served, 0) + 1

    def _settle(self, batch: DenoiseBatch) -> None:
        self.settled = batch.number
        self.dying.pop(batch.number, None)
