"""How fast this engine computes text, and what its load means in seconds.

A step of R rows and P prompt positions beyond one a row takes

    seconds = base + row_s x R + unit_s x P

`base` and `row_s` are a line through the last steps without prefill, `unit_s` is what steps with prefill take above
that line. All of it fades step by step, so a device that slows down is noticed within `MEMORY` steps. Until steps
without prefill have differed in size, a row is taken to cost what a prompt position does, for it computes one: a
replica that comes up under so much load that every step has some prefill would otherwise think its decodes free, look
cheap to the router, and be sent ever more.

The backlog is what a newcomer will wait for, beside the time that its own prompt takes:

    prefill   positions owed x unit_s: they are computed before its own, or share its steps
    decodes   jobs x row_s x steps of a typical output: each of them makes its steps longer
    seats     where not all have one (`max_num_seqs`, or cache memory at the use of the running): the time until enough
              typical outputs have ended

Not modelled: that a long prompt is cut into several steps, the growth of a row's cost with its context, and outputs
that differ from the typical.
"""

from __future__ import annotations

import math
from dataclasses import replace

from serve.backend import Load
from serve.events import FinishReason
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence, TokenBatch

MEMORY = 64
"""Steps that an average looks back over: half a second of decoding at 8 ms a step."""
GAIN = 0.1
"""Of a step on the slope: as many steps as 1 / GAIN are averaged."""
FIRST_UNIT_S = 1e-3
"""Until a prompt has been computed. A model of 1B parameters on a few cores; far too slow for a GPU, for one step."""
FIRST_OUTPUT = 128.0
"""Output tokens, until some have ended."""


class TextPace:
    """A `Pace` over sequences."""

    def __init__(self, scheduler: TokenScheduler):
        self._scheduler = scheduler
        self._decodes = _Line()
        self._prefill_s, self._num_prefilled = FIRST_UNIT_S, 1.0
        self._output = FIRST_OUTPUT
        """Tokens of a typical output."""

    @property
    def unit_s(self) -> float:
        """Of a prompt position."""
        return self._prefill_s / self._num_prefilled

    @property
    def job_s(self) -> float:
        """By how much a decode makes a typical output beside it longer."""
        return self._row_s * self._output

    def step_s(self, num_rows: int) -> float:
        """Of a step without prefill."""
        return self._decodes.at(num_rows)

    def on_step(self, batch: TokenBatch, step_s: float) -> None:
        num_rows = len(batch.rows)
        num_prefilled = sum([len(row.token_ids) for row in batch.rows]) - num_rows
        if not num_prefilled:
            self._decodes.add(num_rows, step_s, self._row_s)
            return
        keep = 1 - 1 / MEMORY
        self._prefill_s = keep * self._prefill_s + max(0.0, step_s - self._decodes.at(num_rows))
        self._num_prefilled = keep * self._num_prefilled + num_prefilled

    def on_finish(self, job: Sequence) -> None:
        if job.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._output += (job.num_output - self._output) / MEMORY

    def cost_s(self, job: Sequence) -> float:
        """Taken to find as much of its prompt cached as others have."""
        num_queries, num_hits = self._scheduler.num_prefix_query_tokens, self._scheduler.num_prefix_hit_tokens
        share = 1 - num_hits / num_queries if num_queries else 1.0
        return len(job.token_ids) * share * self.unit_s + self.job_s

    def predict(self, load: Load) -> Load:
        num_jobs = load.running + load.waiting
        backlog_s = load.tokens_owed * self.unit_s + num_jobs * self.job_s
        seats = float(self._scheduler.max_num_seqs)
        if load.running:
            seats = min(seats, load.running / load.memory) if load.memory else seats
            num_before = max(0.0, num_jobs + 1 - seats)
            backlog_s += num_before / seats * self._output * self.step_s(load.running)
        return replace(load, backlog_s=backlog_s, unit_s=self.unit_s, job_s=self.job_s)

    @property
    def _row_s(self) -> float:
        """Of a decode beside others."""
        slope = self._decodes.slope
        return min(self.unit_s, self._decodes.ceiling) if slope is None else slope


class _Line:
    """Seconds over rows: fading means, and a slope that follows what each step says of it (normalised least mean
    squares, Widrow and Hoff, 1960). Steps of equal size say nothing and change nothing."""

    def __init__(self) -> None:
        self.slope: float | None = None
        """None before steps have differed."""
        self._num = self._x = self._y = 0.0

    @property
    def ceiling(self) -> float:
        """What a row costs at most: all that the steps so far took."""
        return self._y / self._x if self._num else math.inf

    def add(self, x: float, y: float, prior: float) -> None:
        """`prior`: the slope to begin with."""
        off = x - self._x
        if self._num and off:
            slope = prior if self.slope is None else self.slope
            slope += GAIN * off * (y - self._y - slope * off) / (off * off + 1.0)
            self.slope = min(max(slope, 0.0), y / x)
        self._num += (1 - self._num) / MEMORY if self._num else 1 / MEMORY
        weight = 1 / (MEMORY * self._num)
        self._x += weight * (x - self._x)
        self._y += weight * (y - self._y)

    def at(self, x: float) -> float:
        return max(0.0, self._y + (self.slope or 0.0) * (x - self._x))
