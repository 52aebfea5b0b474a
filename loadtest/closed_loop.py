"""So many streams at once, each followed by the next: what their reader saw, whatever the streams come over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from statistics import fmean

Stream = Callable[[int, int], AsyncGenerator[int]]
"""(number, num_tokens): ask for `num_tokens`; yields the number of tokens of each piece, 0 where it is told later."""

SHORTEST, LONGEST = 32, 96


@dataclass(frozen=True, slots=True)
class Round:
    """One closed loop. Times to the first piece and to the end."""

    num_streams: int
    num_requests: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_mean_ms: float
    e2e_mean_ms: float
    num_tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


async def closed_loop(stream: Stream, num_streams: int, num_requests: int) -> Round:
    """Raises RuntimeError when a stream gave another number of tokens than it was asked for."""
    numbers = iter(range(num_requests))
    ttfts: list[float] = []
    ends: list[float] = []
    total = 0

    async def reader() -> None:
        nonlocal total
        for number in numbers:
            asked, seen, began = length(number), 0, time.perf_counter()
            async with aclosing(stream(number, asked)) as pieces:
                first = 0.0
                async for num_tokens in pieces:
                    first = first or time.perf_counter()
                    seen += num_tokens
            ttfts.append(first - began)
            ends.append(time.perf_counter() - began)
            total += seen
            if seen != asked:
                raise RuntimeError(f"a stream gave {seen} tokens where {asked} were asked")

    began = time.perf_counter()
    await asyncio.gather(*(reader() for _ in range(num_streams)))
    wall_s = time.perf_counter() - began
    ttfts.sort()
    return Round(
        num_streams=num_streams,
        num_requests=num_requests,
        tokens_per_s=total / wall_s,
        ttft_p50_ms=1e3 * ttfts[len(ttfts) // 2],
        ttft_p99_ms=1e3 * ttfts[min(len(ttfts) - 1, len(ttfts) * 99 // 100)],
        ttft_mean_ms=1e3 * fmean(ttfts),
        e2e_mean_ms=1e3 * fmean(ends),
        num_tokens=total,
    )


def length(number: int) -> int:
    """Tokens to ask for, the same in every run: of one length, streams that begin together would end together."""
    return SHORTEST + number * 37 % (LONGEST - SHORTEST + 1)
