"""Whether an engine goes forward: told by its thread, asked from any other.

Being alive is not enough. An engine is unhealthy when one thing that its thread does (a step, a unit of idle work, a
canary) does not come back within `timeout_s`, and when jobs are here and no step has been completed for that long,
though steps may come and go.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.errors import EngineDead


class Pulse:
    """Written without a lock: each value is one store, and a reader that is late by a step is late by a step."""

    def __init__(self, timeout_s: float, clock: Callable[[], float]):
        self._timeout_s = timeout_s
        self._clock = clock
        self._doing: tuple[str, float] | None = None
        self._progressed = clock()

    def begin(self, what: str) -> None:
        """The thread does `what` from now on."""
        self._doing = what, self._clock()

    def rest(self) -> None:
        """It has come back."""
        self._doing = None

    def beat(self) -> None:
        """Something was completed, or there is something to do from now on."""
        self._progressed = self._clock()

    def check(self, *, has_jobs: bool) -> None:
        """Raise EngineDead when it does not go forward."""
        doing, now = self._doing, self._clock()
        if doing is not None and now - doing[1] > self._timeout_s:
            raise EngineDead(f"{doing[0]} has been running for more than {self._timeout_s:g} s (step_timeout_s)")
        if has_jobs and now - self._progressed > self._timeout_s:
            raise EngineDead(f"no step has been completed for more than {self._timeout_s:g} s (step_timeout_s)")
