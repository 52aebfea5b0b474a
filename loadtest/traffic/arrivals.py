"""When requests are sent: offsets in seconds from the start of a run, fixed by a seed before it begins.

An open loop sends at these times whether or not earlier answers have come, as users do. Inter-arrival times are gamma
distributed with shape `burstiness`, as in `vllm bench serve`: 1 is a Poisson process, below 1 bursty (coefficient of
variation 1 / sqrt(burstiness)), infinity evenly spaced. Where the rate changes in time the same unit-rate process is
stretched by the integral of the rate, so a ramp of Poisson arrivals is an inhomogeneous Poisson process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile


@dataclass(frozen=True, slots=True)
class Stage:
    """So many requests a second for so many seconds; from `rate` to `end_rate` evenly where that is another."""

    rate: float
    duration_s: float
    end_rate: float | None = None
    is_exponential: bool = False
    """The rate grows by equal factors, not by equal steps, in equal times."""

    @property
    def num_expected(self) -> float:
        return self._expected_by(self.duration_s)

    def time_of(self, count: float) -> float:
        """When `count` requests of this stage are due, in seconds from its beginning: the inverse of the rate's
        integral."""
        first, last, length = self.rate, self.rate if self.end_rate is None else self.end_rate, self.duration_s
        if first == last:
            return count / first
        if self.is_exponential:
            growth = math.log(last / first) / length
            return math.log1p(count * growth / first) / growth
        slope = (last - first) / length
        return (math.sqrt(max(0.0, first * first + 2 * slope * count)) - first) / slope

    def _expected_by(self, time_s: float) -> float:
        first, last = self.rate, self.rate if self.end_rate is None else self.end_rate
        if self.is_exponential and first != last:
            growth = math.log(last / first) / self.duration_s
            return first * math.expm1(growth * time_s) / growth
        return first * time_s + (last - first) / self.duration_s * time_s * time_s / 2


def constant_rate(rate: float, *, burstiness: float = 1.0, seed: int = 0) -> Iterator[float]:
    """Offsets without an end, `rate` a second on average. An infinite rate: all at once."""
    if math.isinf(rate):
        while True:
            yield 0.0
    for count in _unit_rate(burstiness, seed):
        yield count / rate


def staged(stages: Sequence[Stage], *, burstiness: float = 1.0, seed: int = 0) -> Iterator[float]:
    """Offsets through the stages in turn; ends with the last."""
    counts = _unit_rate(burstiness, seed)
    began_s, before = 0.0, 0.0
    count = next(counts)
    for stage in stages:
        while count - before < stage.num_expected:
            yield began_s + stage.time_of(count - before)
            count = next(counts)
        before += stage.num_expected
        began_s += stage.duration_s


def replayed(recorded: Sequence[float], speed: float = 1.0) -> Iterator[float]:
    """The offsets of a trace, `speed` times as fast; over and over, one mean gap between the end and the beginning."""
    period = recorded[-1] * len(recorded) / max(1, len(recorded) - 1) or 1.0
    begin = 0.0
    while True:
        yield from ((begin + offset) / speed for offset in recorded)
        begin += period


def first(offsets: Iterator[float], *, num: int | None, duration_s: float | None) -> list[float]:
    """Those within both limits; None is no limit."""
    if duration_s is not None:
        offsets = takewhile(lambda offset: offset < duration_s, offsets)
    return list(islice(offsets, num))


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`2x30,8x60,2-10x30`: 2 requests a second for 30 s, 8 for 60 s, then from 2 to 10 within 30 s."""
    stages = []
    for part in text.split(","):
        rates, _, seconds = part.strip().partition("x")
        low, is_ramp, high = rates.partition("-")
        try:
            stage = Stage(float(low), float(seconds), float(high) if is_ramp else None)
        except ValueError:
            raise ValueError(f"stage {part!r}: write RATExSECONDS or FROM-TOxSECONDS, as in 2x30,2-10x60") from None
        if min(stage.rate, stage.duration_s, stage.end_rate or 1.0) <= 0 or not math.isfinite(stage.num_expected):
            raise ValueError(f"stage {part!r}: rates and seconds are above 0 and finite")
        stages.append(stage)
    return tuple(stages)


def _unit_rate(burstiness: float, seed: int) -> Iterator[float]:
    """The arrival times of a process of one arrival a second, after the first arrival at 0."""
    if burstiness <= 0:
        raise ValueError(f"burstiness is {burstiness}; it is above 0, and 1 for a Poisson process")
    source, count = random.Random(f"arrivals-{seed}"), 0.0
    while True:
        yield count
        count += 1.0 if math.isinf(burstiness) else source.gammavariate(burstiness, 1 / burstiness)
