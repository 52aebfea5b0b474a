"""A mixed trace: prompts and outputs of many lengths, at once or as they come; and what became of its requests.

The same trace goes to us and to a peer. Lengths are log-normal, as those of chats are about; seeds are fixed, so that
every run asks the same.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

from loadtest.gpu.driver import Driver


@dataclass(frozen=True, slots=True)
class Ask:
    due_s: float
    """After the trace's begin."""
    token_ids: list[int]
    num_output: int


@dataclass(slots=True)
class Answer:
    """When the tokens of one request came, in seconds after it was due; those that came together count once."""

    num_output: int
    at_s: list[float] = field(default_factory=list)


def mixed_trace(vocab_size: int, *, num_requests: int, rate: float | None, is_tiny: bool = False) -> list[Ask]:
    """`rate`: requests a second, Poisson; None: all are due at once."""
    chance = random.Random(f"mixed-{num_requests}-{rate}")
    prompt, output = ((24, 8, 96), (6, 3, 12)) if is_tiny else ((400, 32, 4096), (128, 16, 512))
    asks, due_s = [], 0.0
    for _ in range(num_requests):
        length, num_output = _length(chance, *prompt), _length(chance, *output)
        ids = [chance.randrange(3, vocab_size) for _ in range(length)]
        asks.append(Ask(due_s, ids, num_output))
        due_s += chance.expovariate(rate) if rate else 0.0
    return asks


def _length(chance: random.Random, median: int, least: int, most: int) -> int:
    return max(least, min(most, round(median * chance.lognormvariate(0.0, 0.8))))


def play(driver: Driver, asks: list[Ask]) -> list[Answer]:
    """Each is submitted when it is due; its tokens count when the step that made them has been settled."""
    answers = [Answer(ask.num_output) for ask in asks]
    waiting = list(enumerate(asks))[::-1]
    open_streams: dict[int, Any] = {}
    began = time.perf_counter()
    while waiting or open_streams:
        now = time.perf_counter() - began
        while waiting and waiting[-1][1].due_s <= now:
            index, ask = waiting.pop()
            open_streams[index] = driver.submit(ask.token_ids, ask.num_output)
        if not driver.engine.step():
            if not open_streams:
                time.sleep(max(0.0, began + waiting[-1][1].due_s - time.perf_counter()))
            driver.engine.check_health()
        now = time.perf_counter() - began
        for index, stream in list(open_streams.items()):
            is_over = stream.finish_reason is not None
            if stream.take():
                answers[index].at_s.append(now - asks[index].due_s)
            if is_over:
                del open_streams[index]
    return answers


def summary(asks: list[Ask], answers: list[Answer]) -> dict[str, Any]:
    """Columns of a row: totals, and percentiles of the first token's time and of the time to each later one."""
    seconds = max(ask.due_s + answer.at_s[-1] for ask, answer in zip(asks, answers, strict=True))
    first = [answer.at_s[0] for answer in answers]
    later = [b - a for answer in answers for a, b in zip(answer.at_s, answer.at_s[1:])]
    num_output = sum(answer.num_output for answer in answers)
    return {
        "requests": len(asks),
        "prompt_tokens": sum(len(ask.token_ids) for ask in asks),
        "output_tokens": num_output,
        "seconds": seconds,
        "output_tok_s": num_output / seconds,
        **{f"ttft_p{p}_ms": 1e3 * percentile(first, p) for p in (50, 90, 99)},
        **{f"itl_p{p}_ms": 1e3 * percentile(later, p) for p in (50, 90, 99)},
    }


def percentile(values: list[float], p: int) -> float:
    """By the nearest rank; 0 of nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * p // 100)] if ranked else 0.0


LOADS: tuple[tuple[str, int, float | None], ...] = (("all at once", 128, None), ("5 requests/s", 50, 5.0))
"""Name, number of requests, requests a second. The first asks for throughput, the second for waiting times."""
TINY_LOADS: tuple[tuple[str, int, float | None], ...] = (("all at once", 6, None), ("50 requests/s", 4, 50.0))
