"""A budget of training time: how much is spent, what rate that means, when it is time for a checkpoint."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class TrainingBudget:
    """Minutes of processor time: none is spent while the process is stopped or others have its core.

    The learning rate follows the share that is spent, so that a run ends with a finished schedule.
    """

    def __init__(self, minutes: float, warmup: float = 0.02) -> None:
        self.minutes = minutes
        self.warmup = warmup
        self.spent_s = 0.0
        self._bar: tqdm[Any] | None = None

    @property
    def share(self) -> float:
        """The share of the budget that is spent, 0 to 1."""
        return min(1.0, self.spent_s / (60 * self.minutes)) if self.minutes > 0 else 1.0

    @property
    def rate(self) -> float:
        """Warm-up, then a cosine from 1 to 1 %, over the share of the budget."""
        if self.share < self.warmup:
            return max(0.02, self.share / self.warmup)
        progress = (self.share - self.warmup) / (1 - self.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    def steps(self, name: str) -> Iterator[int]:
        """Counts training steps until the budget is spent; what the caller does in each is what costs."""
        self._bar = tqdm(
            total=round(60 * self.minutes), initial=round(self.spent_s), unit="s", desc=name, mininterval=5
        )
        for step in itertools.count():
            if self.share >= 1.0:
                break
            started = time.process_time()
            yield step
            self.spent_s += time.process_time() - started
            self._bar.update(min(round(self.spent_s), self._bar.total) - self._bar.n)
        self._bar.close()

    def show(self, **figures: float | str) -> None:
        """Figures beside the bar."""
        assert self._bar is not None
        self._bar.set_postfix(refresh=False, **figures)

    def say(self, line: str) -> None:
        """A line above the bar."""
        assert self._bar is not None
        self._bar.write(line)
