"""What the simulated clients ask, fixed by a seed: when, how long a prompt, how long an answer.

Lengths are log-normal around the medians that Patel et al. (Splitwise, 2024) give for Azure's conversations, prompts of
1020 tokens and answers of 129; the spread is chosen here. A day is the two-humped curve of office hours; both are made
up where no trace file is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loadtest.simulator.visit import Visit, visit_of
from loadtest.traffic.traces import Arrival, TextArrival

DAY_S = 86400.0
_HOURS = (30, 22, 17, 15, 15, 18, 27, 42, 62, 82, 95, 100, 93, 90, 96, 98, 94, 84, 72, 66, 63, 58, 48, 38)
"""Of the busiest hour, in percent, at the beginning of each hour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Of prompts and outputs, in tokens."""

    prompt_median: float = 1020.0
    output_median: float = 129.0
    sigma: float = 0.7
    most_prompt: int = 4096
    most_output: int = 1024

    def draw(self, source: random.Random) -> tuple[int, int]:
        prompt = self.prompt_median * math.exp(source.gauss(0.0, self.sigma))
        output = self.output_median * math.exp(source.gauss(0.0, self.sigma))
        return (
            max(1, min(self.most_prompt, round(prompt))),
            max(1, min(self.most_output, round(output))),
        )

    @property
    def prompt_mean(self) -> float:
        return self.prompt_median * math.exp(self.sigma**2 / 2)

    @property
    def output_mean(self) -> float:
        return self.output_median * math.exp(self.sigma**2 / 2)


def steady(rate: float, seconds: float, lengths: Lengths, *, seed: int = 0) -> Iterator[Visit]:
    """Poisson arrivals."""
    source, at, number = random.Random(f"steady-{seed}"), 0.0, 0
    while (at := at + source.expovariate(rate)) < seconds:
        yield visit_of(number, at, *lengths.draw(source))
        number += 1


def day(
    peak_rate: float, lengths: Lengths, *, seed: int = 0, begin_s: float = 0.0, end_s: float = DAY_S
) -> Iterator[Visit]:
    """Poisson arrivals whose rate follows the day, thinned from the peak's (Lewis and Shedler, 1979). Times from 0."""
    source, at, number = random.Random(f"day-{seed}"), begin_s, 0
    while (at := at + source.expovariate(peak_rate)) < end_s:
        if source.random() < day_share(at):
            yield visit_of(number, at - begin_s, *lengths.draw(source))
            number += 1


def day_share(at_s: float) -> float:
    """Of the peak's rate, at a time of day."""
    hour = at_s / 3600 % 24
    before, part = int(hour), hour % 1
    return (_HOURS[before] * (1 - part) + _HOURS[(before + 1) % 24] * part) / 100


def recorded(arrivals: Iterable[Arrival], speed: float = 1.0) -> Iterator[Visit]:
    """A trace of text requests."""
    for number, arrival in enumerate(arrivals):
        if isinstance(arrival, TextArrival):
            yield visit_of(number, arrival.at_s / speed, max(1, arrival.num_prompt), max(1, arrival.num_output))
