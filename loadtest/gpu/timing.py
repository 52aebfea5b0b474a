"""How long a kernel takes: by the device's own events, with its cache emptied in between, the median of many.

What empties the cache (a fill of 256 MiB) also gives the host time to launch: so what is timed is the kernel, not how
long Python takes to ask for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_CACHE_BYTES = 256 << 20
"""Several times the L2 cache of any card there is."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    low_s: float
    high_s: float
    """The tenth and the ninetieth percentile."""

    @property
    def spread(self) -> float:
        """Between the two, as a share of the median."""
        return (self.high_s - self.low_s) / self.median_s if self.median_s else 0.0


class Stopwatch:
    """Times functions that launch work on one device. On the CPU once, by the clock: enough for a rehearsal."""

    def __init__(self, device: torch.device, *, seconds: float = 0.1, empties_cache: bool = True):
        """`seconds`: what the calls of one measurement may take together, about."""
        self._device = device
        self._seconds = seconds
        is_cuda = device.type == "cuda"
        self._filler = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device) if is_cuda and empties_cache else None

    def __call__(self, compute: Callable[[], object]) -> Timing:
        if self._device.type != "cuda":
            began = time.perf_counter()
            compute()
            took = time.perf_counter() - began
            return Timing(took, took, took)
        compute()  # compiles
        once = self._events(compute, 2)
        number = min(100, max(5, int(self._seconds / max(min(once), 1e-6))))
        times = sorted(self._events(compute, number))
        return Timing(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10])

    def _events(self, compute: Callable[[], object], number: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(number)]
        for start, end in pairs:
            if self._filler is not None:
                self._filler.zero_()
            start.record()
            compute()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]
