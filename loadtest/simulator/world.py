"""Virtual time: a clock that jumps from one event to the next. No thread, no sleep, no randomness of its own."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable


class World:
    """Events in order of time; those of one moment in the order in which they were announced."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """`event` is called when it is `time_s`, or next if that has passed."""
        self._num_events += 1
        heapq.heappush(self._events, (max(time_s, self.now), self._num_events, event))

    def run(self, until_s: float = math.inf) -> None:
        """Until nothing is left to happen, or up to that time."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, event = heapq.heappop(self._events)
            event()
        if until_s < math.inf:
            self.now = max(self.now, until_s)
