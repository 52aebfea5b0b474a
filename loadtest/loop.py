"""What a step costs beside the model: `python -m loadtest.loop` prints one JSON line with µs per step.

Every job is in every step and gets an output, and the runner computes nothing, so what is left is the loop's own work.
Three measurements, each at 1, 32 and 256 running jobs:

    engine     the loop and its streams; a scheduler that does as little as possible, nobody reading
    readers    the same with a task waiting on every stream: what waking them costs the engine's thread
    text       the loop and the token scheduler decoding; readers as before

Time is the CPU time of the engine's thread, so that a busy machine disturbs little: the median over rounds, with the
fastest and the slowest beside it.
"""

from __future__ import annotations

import asyncio
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from serve.backend import Load
from serve.engine.engine import Engine
from serve.engine.interface import Update
from serve.engine.job import Job, Status
from serve.engine.stream import Stream
from serve.request import SamplingParams
from serve.text.kv_cache import KVCache
from serve.text.pace import TextPace
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence, TokenBatch, TokenOutput

NUM_JOBS = (1, 32, 256)
NUM_ROUNDS, NUM_STEPS = 9, 100
MAX_TOKENS = (NUM_ROUNDS + 2) * NUM_STEPS


@dataclass(slots=True)
class WholeBatch:
    jobs: list[Job]
    num_tokens: int
    stage: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.jobs)


class LeastScheduler:
    """Everybody in every step, an output for each, nobody ever done."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._updates: list[Update[Job]] = []

    def validate(self, job: Job) -> None: ...

    def add(self, job: Job) -> None:
        job.status = Status.RUNNING
        self._jobs.append(job)
        self._updates.append(Update(job, 1))

    def remove(self, job: Job) -> None: ...

    def schedule(self, only: Job | None = None) -> WholeBatch | None:
        return WholeBatch(self._jobs, len(self._jobs)) if self._jobs else None

    def update(self, batch: WholeBatch, output: None) -> Iterable[Update[Job]]:
        return self._updates

    def abandon(self, batch: WholeBatch) -> None: ...

    def load(self) -> Load:
        return Load(running=len(self._jobs))


class IdleRunner:
    """Computes nothing: gives back what the batch asks for."""

    def __init__(self, answer: Callable[[Any], Any]):
        self._answer = answer

    def submit(self, batch: Any) -> Any:
        return batch

    def collect(self, handle: Any) -> Any:
        return self._answer(handle)

    def release(self, job_id: str) -> None: ...

    def check(self) -> None: ...


def least_engine(num_jobs: int) -> tuple[Engine[Any, Any, Any], list[Job]]:
    engine: Engine[Any, Any, Any] = Engine(LeastScheduler(), IdleRunner(lambda batch: None))
    return engine, [Job(id=str(i)) for i in range(num_jobs)]


def text_engine(num_jobs: int) -> tuple[Engine[Any, Any, Any], list[Job]]:
    def answer(batch: TokenBatch) -> TokenOutput:
        nothing = [None] * len(batch.rows)
        return TokenOutput([(1,) if row.samples else () for row in batch.rows], nothing, nothing)

    scheduler = TokenScheduler(
        KVCache(num_blocks=(num_jobs + 16) * (MAX_TOKENS // 16 + 2)),
        max_num_seqs=num_jobs,
        max_num_batched_tokens=8192,
        max_model_len=2 * MAX_TOKENS,
        eos_token_ids=[],
        vocab_size=100,
    )
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    jobs = [Sequence(id=str(i), token_ids=[i % 100] * 8, num_prompt=8, sampling=sampling) for i in range(num_jobs)]
    return Engine(scheduler, IdleRunner(answer), pace=TextPace(scheduler)), list(jobs)


async def measure(
    build: Callable[[int], tuple[Engine[Any, Any, Any], list[Job]]], num_jobs: int, *, has_readers: bool
) -> dict[str, float]:
    """µs per step. Only `step` is timed; readers get the event loop between steps."""
    engine, jobs = build(num_jobs)
    streams = [engine.submit(job) for job in jobs]
    readers = [asyncio.create_task(drain(stream)) for stream in streams] if has_readers else []
    rounds = []
    for _ in range(NUM_ROUNDS + 1):
        spent = 0.0
        for _ in range(NUM_STEPS):
            started = time.thread_time()
            engine.step()
            spent += time.thread_time() - started
            for _ in range(3):  # the wake-up, the readers, and their next wait
                await asyncio.sleep(0)
            if not has_readers:
                for stream in streams:
                    stream.take()
        rounds.append(spent / NUM_STEPS * 1e6)
    for reader in readers:
        reader.cancel()
    rounds = rounds[1:]  # the first fills caches and prefills
    return {name: round(of(rounds), 1) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


async def drain(stream: Stream[Any]) -> None:
    async for _ in stream:
        pass


def main() -> None:
    cases = {
        "engine": (least_engine, False),
        "readers": (least_engine, True),
        "text": (text_engine, True),
    }
    report = {
        "benchmark": "loop",
        "unit": "us per step",
        "python": platform.python_version(),
        "rounds": NUM_ROUNDS,
        "steps_per_round": NUM_STEPS,
        **{
            name: {num_jobs: asyncio.run(measure(build, num_jobs, has_readers=has_readers)) for num_jobs in NUM_JOBS}
            for name, (build, has_readers) in cases.items()
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
