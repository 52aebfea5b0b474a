"""What is asked of a replica, over the last seconds: from the loads it reports to the signals that scale its model."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import fmean

from serve.autoscaling import Signals
from serve.backend import Load
from serve.options import AutoscalingOptions

SAMPLE_PERIOD_S = 0.25
"""How often a load is to be observed: half a second of queue is not missed."""


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    load: Load
    refused_s: float


class Demand:
    """A window over one replica's loads. No clock of its own; one thread."""

    def __init__(self, options: AutoscalingOptions, *, load_s: float):
        """`load_s`: how long the replica took to come up."""
        self._options = options
        self._load_s = load_s
        self._samples: deque[_Sample] = deque()

    def observe(self, load: Load, now: float, *, refused_s: float = 0.0) -> None:
        """A load, and the seconds of work that gateways have refused so far because of it."""
        self._samples.append(_Sample(now, load, refused_s))
        while self._samples[0].at < now - self._options.look_back_period_s:
            self._samples.popleft()

    def signals(self) -> Signals:
        """As of the last sample."""
        if not self._samples:
            return Signals(load_s=self._load_s)
        first, last = self._samples[0], self._samples[-1]
        offered_s = last.load.offered_s - first.load.offered_s + last.refused_s - first.refused_s
        loads = [sample.load for sample in self._samples]
        return Signals(
            # A window that is still short must not take its first few jobs for a rate.
            work=offered_s / max(last.at - first.at, self._options.look_back_period_s / 2),
            wait_s=fmean(load.backlog_s for load in loads),
            memory=fmean(load.memory for load in loads),
            late=fmean(load.backlog_s > self._options.target_wait_s for load in loads),
            jobs=fmean(load.running + load.waiting for load in loads),
            load_s=self._load_s,
        )
