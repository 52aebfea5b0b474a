"""Jobs in the order of a policy: a key function, whose smallest value comes first, equal ones in order of adding.

A binary heap with lazy deletion: removing marks an entry dead, dead entries leave when they surface or when they
outnumber the living. A key must not change while its job is queued; ageing is therefore written as a comparison of
arrival times, which all age alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from serve.engine.job import Job

J = TypeVar("J", bound=Job)

AGING_S = 10.0
"""Seconds of waiting that weigh as much as one level of priority: many steps, yet less than a client's patience."""


def aged_priority(job: Job) -> float:
    """More urgent first. One priority level is worth `AGING_S` seconds of waiting, so nobody starves.

    A preempted job keeps its arrival and so its place.
    """
    return job.arrival - AGING_S * job.priority


class WaitingQueue(Generic[J]):
    """Jobs by policy. `add`, `remove` and `pop` are O(log n) amortised, `peek` and `in` O(1)."""

    def __init__(self, key: Callable[[J], float] = aged_priority):
        self._key = key
        self._heap: list[tuple[float, int, J]] = []
        self._living: dict[J, int] = {}
        """Job → serial number of its one valid entry in the heap."""
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._living)

    def __contains__(self, job: J) -> bool:
        return job in self._living

    def __iter__(self) -> Iterator[J]:
        """All jobs, in no particular order."""
        return iter(self._living)

    def add(self, job: J) -> None:
        assert job not in self._living, f"job {job.id!r} is queued twice"
        self._num_added += 1
        self._living[job] = self._num_added
        heapq.heappush(self._heap, (self._key(job), self._num_added, job))

    def remove(self, job: J) -> bool:
        """Forget `job`; False when it was not here."""
        if self._living.pop(job, None) is None:
            return False
        if len(self._heap) > 2 * len(self._living) + 16:
            self._heap = [entry for entry in self._heap if self._is_living(entry)]
            heapq.heapify(self._heap)
        return True

    def peek(self) -> J | None:
        """The first job, or None when there is none."""
        while self._heap:
            if self._is_living(self._heap[0]):
                return self._heap[0][2]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> J:
        """Take the first job; IndexError when there is none."""
        job = self.peek()
        if job is None:
            raise IndexError("pop from an empty waiting queue")
        heapq.heappop(self._heap)
        del self._living[job]
        return job

    def _is_living(self, entry: tuple[float, int, J]) -> bool:
        return self._living.get(entry[2]) == entry[1]
