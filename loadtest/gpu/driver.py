"""An engine stepped by hand, and a clock reading at the end of every step: what the measurements of text are made from.

Times of steps come from the engine's own observer, so nothing is done per token that a replica would not do.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from itertools import count

from serve.engine.interface import StepStats
from serve.engine.job import Job
from serve.engine.stream import Stream
from serve.options import ModelOptions
from serve.request import SamplingParams
from serve.text.build import build_engine
from serve.text.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A step that was settled. A prompt's chunk counts as many tokens, a decode as one."""

    at_s: float
    num_jobs: int
    num_tokens: int


class StepLog:
    """An engine's `Observer`."""

    def __init__(self) -> None:
        self.ends: list[StepEnd] = []

    def on_step(self, stats: StepStats) -> None:
        self.ends.append(StepEnd(time.perf_counter(), stats.num_jobs, stats.num_tokens))

    def on_finish(self, job: Job) -> None: ...

    def on_canary(self, duration_s: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Decodes:
    """Consecutive steps in which every one of `batch` sequences had one new token and nobody had more."""

    batch: int
    step_s: float
    """The mean: what tokens/s are of."""
    p90_s: float
    num_steps: int
    positions: float
    """Keys of all sequences together that such a step reads, on average."""

    @property
    def tok_s(self) -> float:
        return self.batch / self.step_s


def decodes_in(ends: list[StepEnd], batch: int, *, settling: int = 3) -> Decodes:
    """The last such steps of a log that begins with the prompts of `batch` sequences and holds nothing else; without
    the first and the last `settling` of them, which overlap with steps of other kinds."""
    stop = len(ends)
    while stop and not _is_decode(ends[stop - 1], batch):
        stop -= 1
    start = stop
    while start and _is_decode(ends[start - 1], batch):
        start -= 1
    first, last = start + settling, stop - 1 - settling
    if last - first < 1:
        raise ValueError(f"{stop - start} steps of {batch} decodes alone are too few to be timed")
    times = [later.at_s - earlier.at_s for earlier, later in zip(ends[first:last], ends[first + 1 : last + 1])]
    before = sum(end.num_tokens for end in ends[: first + 1])  # every token so far is a position in the cache
    return Decodes(
        batch,
        (ends[last].at_s - ends[first].at_s) / (last - first),
        sorted(times)[len(times) * 9 // 10],
        last - first,
        statistics.mean(before + batch * (1 + i) for i in range(last - first)),
    )


def _is_decode(end: StepEnd, batch: int) -> bool:
    return end.num_jobs == end.num_tokens == batch


class Driver:
    """Builds the engine of `options` and does what it does while idle, so that every graph is there."""

    def __init__(self, options: ModelOptions):
        self.log = StepLog()
        self.options = options
        self.engine, self.card = build_engine(options, progress=False, observer=self.log)
        while self.engine.use_idle_time():
            pass
        self._numbers = count()
        self._chance = random.Random(0)

    @property
    def step_budget(self) -> int:
        """Positions of a step, at most."""
        on_device = 8192 if self.card.device.startswith("cuda") else 1024
        return self.options.max_num_batched_tokens or on_device

    def prompts(self, number: int, length: int) -> list[list[int]]:
        """Random tokens: others at every call, the same in every run."""
        return [[self._chance.randrange(3, self.card.vocab_size) for _ in range(length)] for _ in range(number)]

    def submit(
        self,
        prompt: list[int],
        num_output: int,
        *,
        temperature: float = 0.0,
        logit_bias: tuple[tuple[int, float], ...] = (),
        may_speculate: bool = True,
    ) -> Stream[Sequence]:
        number = next(self._numbers)
        sampling = SamplingParams(
            max_tokens=num_output, temperature=temperature, logit_bias=logit_bias, seed=number, ignore_eos=True
        )
        sequence = Sequence(
            id=f"gpu-{number}",
            token_ids=list(prompt),
            num_prompt=len(prompt),
            sampling=sampling,
            may_speculate=may_speculate,
        )
        return self.engine.submit(sequence)

    def run(self) -> list[StepEnd]:
        """Until all have ended; the steps it took."""
        first = len(self.log.ends)
        while self.engine.step():
            pass
        self.engine.check_health()
        return self.log.ends[first:]

    def decodes(self, prompts: list[list[int]], num_steps: int, *, temperature: float = 0.0) -> Decodes:
        """About so many steps of one token for each of `prompts`."""
        num_prefills = -(-sum(map(len, prompts)) // max(1, self.step_budget - len(prompts)))
        streams = [self.submit(prompt, num_prefills + num_steps + 10, temperature=temperature) for prompt in prompts]
        ends = self.run()
        for stream in streams:
            stream.take()
            stream.take()  # raises what a request has failed of, behind its outputs
        return decodes_in(ends, len(prompts))

    def prefill_s(self, prompts: list[list[int]]) -> float:
        """From submission to the first token of the last of them."""
        began = time.perf_counter()
        for prompt in prompts:
            self.submit(prompt, 1)
        return self.run()[-1].at_s - began

    def close(self) -> None:
        self.engine.close()
