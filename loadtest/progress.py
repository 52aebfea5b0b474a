"""What a run looks like while it runs: a live table where rich is installed (extra `loadtest`) and a terminal is there,
else a line every few seconds. Drawn once a second at most, for drawing takes time from reading answers."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from loadtest.measure.driver import Driver
from loadtest.measure.outcome import Outcome, Status
from loadtest.measure.slo import Slo, judged

LIVE_S = 1.0
PLAIN_S = 5.0
RECENT = 500
"""Latencies are of so many requests that ended last."""


@contextlib.asynccontextmanager
async def shown(driver: Driver, title: str, slo: Slo, is_wanted: bool) -> AsyncIterator[None]:
    """Show a driver's run until the block ends."""
    if not is_wanted:
        yield
        return
    drawing = asyncio.create_task(_live(driver, title, slo) if _has_rich() else _plain(driver, title, slo))
    try:
        yield
    finally:
        drawing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drawing


def state(driver: Driver, slo: Slo) -> dict[str, str]:
    """What is told, name by value.."""
    run = driver.run
    now = time.perf_counter() - run.origin
    ended = [one for one in run.outcomes if one.end and one.group != "probe"]
    lately = [one for one in ended[-RECENT:] if one.is_ok]
    told = {
        "time": f"{now:.0f} s",
        "sent": f"{len(run.outcomes)}" + (f" of {run.num_planned}" if run.num_planned else ""),
        "in flight": str(sum(not one.end for one in run.outcomes)),
        "completed": str(sum(one.is_ok for one in ended)),
        "errors": str(_count(ended, Status.ERROR)),
        "429s": str(_count(ended, Status.REJECTED)),
        "timeouts": str(_count(ended, Status.TIMEOUT)),
    }
    if tokens := sum(one.output_tokens for one in ended):
        told["output tokens/s"] = f"{tokens / now:.0f}"
        told["TTFT p50 / p99"] = _pair([one.ttft for one in lately if one.ttft is not None])
        told["TPOT p50 / p99"] = _pair([one.tpot for one in lately if one.tpot is not None])
    if images := [one for one in lately if one.group == "image"]:
        told["image p50 / p99"] = _pair([one.e2e for one in images])
        told["images/s"] = f"{sum(one.group == 'image' and one.is_ok for one in ended) / now:.1f}"
    if slo.limits_ms and (counted := judged(ended)):
        told["good"] = f"{sum(map(slo.is_good, counted)) / len(counted):.1%}"
    return told


async def _live(driver: Driver, title: str, slo: Slo) -> None:
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        drawn = Table(title=title, show_header=False, title_justify="left")
        for name, value in state(driver, slo).items():
            drawn.add_row(name, value, style="red" if name in ("errors", "timeouts") and value != "0" else None)
        return drawn

    with Live(table(), auto_refresh=False, transient=True) as live:
        while True:
            await asyncio.sleep(LIVE_S)
            live.update(table(), refresh=True)


async def _plain(driver: Driver, title: str, slo: Slo) -> None:
    while True:
        await asyncio.sleep(PLAIN_S)
        told = ", ".join(f"{name} {value}" for name, value in state(driver, slo).items())
        print(f"{title}: {told}", file=sys.stderr, flush=True)


def _has_rich() -> bool:
    if not sys.stdout.isatty():
        return False
    try:
        import rich.live  # noqa: F401
    except ImportError:
        return False
    return True


def _count(outcomes: list[Outcome], status: Status) -> int:
    return sum(one.status is status for one in outcomes)


def _pair(values: list[Any]) -> str:
    if not values:
        return "-"
    median, high = np.percentile(values, [50, 99])
    return f"{median * 1e3:.1f} / {high * 1e3:.1f} ms"
