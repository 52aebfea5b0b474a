"""Measured steps, and the device they say an engine has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loadtest.paced import TextDevice
from serve.backend import Load
from serve.text.pace import TextPace
from serve.text.sequence import TokenBatch

IDLE_S = 0.005
"""Longer between two steps and the engine had nothing to do; less is its own work."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """One settled step."""

    num_rows: int
    num_further: int
    """Positions beyond one a row."""
    num_context: int
    """That the rows attend to."""
    seconds: float
    """With what the engine did since the step before, where it did not wait."""


class SamplingPace:
    """A `Pace` that keeps what the pace beside it is told."""

    def __init__(self, pace: TextPace):
        self.samples: list[StepSample] = []
        self._pace = pace
        self._ended = 0.0

    def on_step(self, batch: TokenBatch, step_s: float) -> None:
        self._pace.on_step(batch, step_s)
        now, num_rows = time.monotonic(), len(batch.rows)
        between_s = now - step_s - self._ended
        seconds = step_s + (between_s if 0 < between_s < IDLE_S else 0.0)
        self._ended = now
        num_context = sum([row.start + len(row.token_ids) for row in batch.rows])
        self.samples.append(StepSample(num_rows, batch.num_tokens - num_rows, num_context, seconds))

    def on_finish(self, job: Any) -> None:
        self._pace.on_finish(job)

    def cost_s(self, job: Any) -> float:
        return self._pace.cost_s(job)

    def predict(self, load: Load) -> Load:
        return self._pace.predict(load)


@dataclass(frozen=True, slots=True)
class Fit:
    """A device, and how well it tells the steps it was fitted to."""

    device: TextDevice
    num_steps: int
    error_of_sum: float
    """Of the time of all steps, as a share."""
    error_of_step: float
    """Median over the steps, as a share."""


def fit(samples: Sequence[StepSample], like: TextDevice) -> Fit:
    """The device of least squared relative error among those with no negative cost. `like`: for what is no time.

    The slowest hundredth of the steps is left out: a shared machine stops a process now and then.
    """
    limit = sorted(sample.seconds / (1 + sample.num_further) for sample in samples)[int(0.99 * (len(samples) - 1))]
    kept = [sample for sample in samples if sample.seconds / (1 + sample.num_further) <= limit]
    terms = np.array([[1.0, one.num_rows, one.num_further, one.num_context] for one in kept])
    seconds = np.array([one.seconds for one in kept])
    costs = _least_squares(terms / seconds[:, None], np.ones(len(kept)))
    base_s, row_s, unit_s, context_s = (float(cost) for cost in costs)
    device = replace(like, base_s=base_s, row_s=row_s, unit_s=unit_s, context_s=context_s)
    told = terms @ costs
    return Fit(
        device, len(samples), float(told.sum() / seconds.sum() - 1), float(np.median(np.abs(told / seconds - 1)))
    )


def _least_squares(terms: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Without negative coefficients: who comes out negative is left out, the most negative first."""
    active = list(range(terms.shape[1]))
    while True:
        found = np.linalg.lstsq(terms[:, active], wanted, rcond=None)[0]
        if (found >= 0).all():
            costs = np.zeros(terms.shape[1])
            costs[active] = found
            return costs
        del active[int(found.argmin())]
