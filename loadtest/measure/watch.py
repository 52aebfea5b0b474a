"""Whether the server is still there: a run that only fails is ended, with a verdict."""

from __future__ import annotations

from collections.abc import Callable

from loadtest.measure.outcome import Outcome, Status

FAILURES = 5
"""In a row, at least: one or two may be the requests' own fault."""


class Watch:
    """Counts failures since the last answer. 429 is an answer."""

    def __init__(self, lost_after_s: float, clock: Callable[[], float]):
        self._lost_after_s = lost_after_s
        self._clock = clock
        self._failing_since: float | None = None
        self._num_failures = 0
        self.last_error = ""

    def note(self, outcome: Outcome) -> None:
        if outcome.status in (Status.OK, Status.REJECTED):
            self._failing_since, self._num_failures = None, 0
        elif outcome.status in (Status.ERROR, Status.TIMEOUT):
            if self._failing_since is None:
                self._failing_since = self._clock()
            self._num_failures += 1
            self.last_error = outcome.error

    @property
    def is_lost(self) -> bool:
        """Nothing but failures for `lost_after_s`."""
        if self._failing_since is None or self._num_failures < FAILURES:
            return False
        return self._clock() - self._failing_since >= self._lost_after_s
