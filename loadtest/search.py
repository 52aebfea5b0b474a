"""The highest rate at which enough requests are good: double until too few are, then halve the gap.

Trials send requests of the same kind at the same relative times, only faster or slower, each with other prompts: a
prefix cache must not know them. A rate counts when it also holds with other arrivals (another seed); one that does not
is taken as too high and the search goes on below. A trial of n requests cannot tell shares finer than 1/n: under a
hundred requests, 99 % means all.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial: whether enough were good, and whether the server is still there."""

    rate: float
    is_good: bool
    is_confirmation: bool = False
    is_lost: bool = False


Trial = Callable[[float, bool], Awaitable[Tried]]
"""Runs the load at a rate; the second argument: as a confirmation, with another seed."""


@dataclass(slots=True)
class Search:
    """From `start` up to `limit`, to within `tolerance` (a share of the rate)."""

    start: float
    limit: float
    tolerance: float
    tried: list[Tried] = field(default_factory=list)

    async def __call__(self, trial: Trial) -> float:
        """The rate; 0 when none held. Ends early when the server is lost."""
        low, high = 0.0, math.inf
        while True:
            is_confirmation = self._is_close(low, high)
            if is_confirmation and low == 0.0:
                return 0.0
            rate = low if is_confirmation else self._next(low, high)
            found = await trial(rate, is_confirmation)
            self.tried.append(found)
            if found.is_lost:
                return 0.0
            if found.is_good and is_confirmation:
                return rate
            if found.is_good:
                low = rate
            else:
                low, high = self._below(rate), rate

    def _is_close(self, low: float, high: float) -> bool:
        if low >= self.limit:
            return True
        if low == 0.0:
            return high < self.start / 100  # a hundredth of the first guess: nothing is carried
        return high / low <= 1 + self.tolerance

    def _next(self, low: float, high: float) -> float:
        if math.isinf(high):
            return min(2 * low or self.start, self.limit)
        return high / 2 if low == 0.0 else math.sqrt(low * high)

    def _below(self, rate: float) -> float:
        """The highest rate below it that held; 0 when none did."""
        return max((one.rate for one in self.tried if one.is_good and one.rate < rate), default=0.0)
