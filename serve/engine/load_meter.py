"""What an engine reports of its load: the scheduler's counts after the last step, what has come in since, and what both
mean in seconds (`Pace`)."""

from __future__ import annotations

import threading
from dataclasses import replace

from serve.backend import Load
from serve.engine.interface import Pace
from serve.engine.job import Job


class LoadMeter:
    """`arrive` and `load` on any thread, the rest on the engine's. Without a pace nothing is predicted."""

    def __init__(self, pace: Pace | None):
        self._pace = pace
        self._load = Load()
        self._settled = 0.0
        """When the last batch was."""
        self._offered_s = 0.0
        """Of all jobs that came after the first batch was settled; before that their costs are guesses."""
        self._arriving: dict[str, float] = {}
        """Job id → predicted cost, of those that `_load` does not count. Guarded by `_lock`."""
        self._admitted: list[str] = []
        """Those of them that the next `count` does."""
        self._lock = threading.Lock()

    def load(self) -> Load:
        """As of the last step; what came in since counts as waiting, and its cost as backlog."""
        with self._lock:
            load, costs, offered_s = self._load, [*self._arriving.values()], self._offered_s
        backlog_s = load.backlog_s + sum(costs)
        return replace(load, waiting=load.waiting + len(costs), backlog_s=backlog_s, offered_s=offered_s)

    def arrive(self, job: Job) -> None:
        """Accepted; the scheduler hears of it at the next step."""
        cost_s = 0.0 if self._pace is None else self._pace.cost_s(job)
        with self._lock:
            self._arriving[job.id] = cost_s
            if self._settled:
                self._offered_s += cost_s

    def admit(self, job: Job) -> None:
        """The scheduler has it."""
        self._admitted.append(job.id)

    def on_step(self, batch: object, launched: float, now: float) -> None:
        """A batch was settled. It had the device since it was launched, or since the one before it was settled."""
        if self._pace is not None:
            self._pace.on_step(batch, now - max(launched, self._settled))
            self._settled = now

    def on_finish(self, job: Job) -> None:
        if self._pace is not None:
            self._pace.on_finish(job)

    def count(self, load: Load) -> None:
        """The scheduler's load at the end of a step."""
        if self._pace is not None:
            load = self._pace.predict(load)
        with self._lock:
            self._load = load
            for job_id in self._admitted:
                self._arriving.pop(job_id, None)
        self._admitted.clear()
