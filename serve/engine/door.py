"""The engine's door: who may come in, how many may wait behind it, and when those refused should come back."""

from __future__ import annotations

import threading
from collections import deque

from serve.errors import Overloaded, Unavailable

WINDOW = 64
"""Departures that the service rate is measured over: smooths a batch that ends together, follows a change of load."""
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0
"""Bounds of a retry time: sooner is hammering, later is a guess about a load that will have changed."""


class Door:
    """Bounds the jobs that were accepted and are in no batch yet. Shut, it refuses everybody.

    `lock` is held to let a job in and to shut: so a job is either refused, or known to whoever ends the rest.
    """

    def __init__(self, max_waiting: int):
        self.lock = threading.Lock()
        self._max_waiting = max_waiting
        self._waiting: set[str] = set()
        self._marks: deque[float] = deque(maxlen=WINDOW)
        """When this busy period began, then when jobs left it. Idle time is no slowness."""
        self._notice: tuple[type[Unavailable], str] | None = None

    def shut(self, error: type[Unavailable], message: str) -> None:
        """Refuse everybody from now on, with this error. The last word counts."""
        with self.lock:
            self._notice = (error, message)

    def enter(self, job_id: str, now: float) -> None:
        """Count this job as waiting, or raise why it may not. Under `lock`."""
        if self._notice is not None:
            error, message = self._notice
            raise error(message)
        num_waiting = len(self._waiting)
        if num_waiting >= self._max_waiting:
            retry_after_s = self._time_to_serve(num_waiting, now)
            raise Overloaded(
                f"{num_waiting} requests are waiting, as many as may; try again in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )
        self._waiting.add(job_id)
        if not self._marks:
            self._marks.append(now)

    def pass_on(self, job_id: str) -> None:
        """This job is in a batch: it waits no longer."""
        self._waiting.discard(job_id)

    def leave(self, job_id: str, now: float, *, is_last: bool) -> None:
        """This job has ended, scheduled or not."""
        self._waiting.discard(job_id)
        self._marks.append(now)
        if is_last:
            self._marks.clear()

    def _time_to_serve(self, num_jobs: int, now: float) -> float:
        """Seconds until so many will have left, at the pace of the last departures."""
        marks = tuple(self._marks)
        if marks:
            num_left = max(len(marks) - 1, 1)  # nobody yet: the first will take no less than it has taken
            return min(max(num_jobs * (now - marks[0]) / num_left, LEAST_RETRY_S), MOST_RETRY_S)
        return LEAST_RETRY_S
