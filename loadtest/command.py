"""The command `tandem loadtest`: run, sweep, search, compare. Exit statuses are in `loadtest/measure/verdict.py`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from loadtest import result
from loadtest.flags import UsageError, pairs, parser
from loadtest.measure.driver import Driver, Ending, Run
from loadtest.measure.outcome import Outcome
from loadtest.measure.slo import judged
from loadtest.page.page import render
from loadtest.search import Search, Tried
from loadtest.session import NotReady, Session, on_interrupt
from serve.errors import TandemError

ACTIONS = ("run", "sweep", "search", "compare")
MIN_GOOD = 0.99
"""Of a search where --min-good does not say: the share that the headline figure is about."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Ends with an exit status. Without an action: `run`."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0] not in ACTIONS and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    args = parser().parse_args(given)
    try:
        raise SystemExit(_compare(args) if args.action == "compare" else _run(_ACTIONS[args.action](args)))
    except UsageError as error:
        print(f"tandem loadtest: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (NotReady, TandemError, OSError) as error:
        print(f"tandem loadtest: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _run(action: Any) -> int:
    try:
        import uvloop
    except ImportError:
        return int(asyncio.run(action))
    return int(uvloop.run(action))


async def _once(args: argparse.Namespace) -> int:
    session = await _ready(args)
    try:
        told, run = await session.measure(session.plan.load(), args.request_rate)
    finally:
        await session.aclose()
    return _leave(args, told, run)


async def _sweep(args: argparse.Namespace) -> int:
    """Every rate in turn; the files are of the last, with the figures of all."""
    session = await _ready(args)
    trials: list[dict[str, Any]] = []
    try:
        for rate in args.rates:
            told, run = await session.measure(
                session.plan.load(rate=rate, number=len(trials)), rate, title=f"{rate:g} requests/s"
            )
            trials.append(_trial(told, is_confirmation=False))
            if told["verdict"]["exit_status"] in (3, 130):
                break
    finally:
        await session.aclose()
    return _leave(args, {**told, "trials": trials}, run)


async def _search(args: argparse.Namespace) -> int:
    """The files are of the last run at the rate that was found."""
    if not args.goodput:
        raise UsageError("search needs --goodput: what a good request is, as in --goodput ttft:500 tpot:50")
    wanted, args.min_good = args.min_good or MIN_GOOD, None
    session = await _ready(args)
    trials: list[dict[str, Any]] = []
    best: tuple[dict[str, Any], Run] | None = None

    async def trial(rate: float, is_confirmation: bool) -> Tried:
        nonlocal best
        load = session.plan.load(rate=rate, number=len(trials), is_confirmation=is_confirmation)
        num_bad = math.floor((1 - wanted) * len(load.offsets or ())) + 1
        seen = {"bad": 0}

        def give_up(driver: Driver, outcome: Outcome) -> None:
            seen["bad"] += bool(judged([outcome])) and not session.slo.is_good(outcome)
            if seen["bad"] >= max(num_bad, 3):
                driver.stop(Ending.HOPELESS)

        told, run = await session.measure(load, rate, title=f"search: {rate:.3g} requests/s", on_end=give_up)
        is_good = run.ending is Ending.DONE and told["good_share"] >= wanted
        trials.append({**_trial(told, is_confirmation=is_confirmation), "is_good": is_good})
        is_lost = told["verdict"]["exit_status"] in (3, 130)
        if is_good or best is None or is_lost:
            best = told, run
        _say_trial(trials[-1])
        return Tried(rate, is_good, is_confirmation, is_lost)

    try:
        found = await Search(args.search_start, args.search_limit, args.search_tolerance)(trial)
    finally:
        await session.aclose()
    assert best is not None
    told, run = best
    told |= {"trials": trials, "max_rate_at_slo": found, "min_good": wanted}
    status = _leave(args, told, run)
    print(f"Highest rate at SLO: {found:.3g} requests/s ({wanted:.0%} good: {' '.join(args.goodput)})")
    return status


_ACTIONS = {"run": _once, "sweep": _sweep, "search": _search}


async def _ready(args: argparse.Namespace) -> Session:
    session = await Session.open(args)
    on_interrupt(session.interrupt)
    try:
        await session.warm_up()
    except BaseException:
        await session.aclose()
        raise
    return session


def _leave(args: argparse.Namespace, told: dict[str, Any], run: Run) -> int:
    """Print, write, and the exit status."""
    told |= pairs(args.metadata, "--metadata")
    written = result.write(args, told, run, render([told])) if args.save_result else []
    print(result.table(told, args.percentile_metrics))
    for path in written:
        print(f"wrote {path}")
    return int(told["verdict"]["exit_status"])


def _compare(args: argparse.Namespace) -> int:
    results = []
    for file in args.files:
        told = json.loads(Path(file).read_text(encoding="utf-8"))
        if "timeline" not in told:
            raise UsageError(f"{file} is not a result of tandem loadtest")
        results.append(told)
    Path(args.output).write_text(render(results), encoding="utf-8")
    print(f"wrote {args.output}")
    return 0


def _trial(told: dict[str, Any], *, is_confirmation: bool) -> dict[str, Any]:
    """What is kept of one of several runs: all but the distributions."""
    kept = {name: value for name, value in told.items() if isinstance(value, int | float | None)}
    groups = {
        group: {name: value for name, value in own.items() if isinstance(value, int | float)}
        for group, own in told["groups"].items()
    }
    return {**kept, "groups": groups, "is_confirmation": is_confirmation}


def _say_trial(trial: dict[str, Any]) -> None:
    kind = "again with another seed" if trial["is_confirmation"] else "tried"
    print(
        f"{kind}: {trial['request_rate']:.3g} requests/s, {trial['good_share']:.2%} good of {trial['num_prompts']}: "
        f"{'holds' if trial['is_good'] else 'too much'}",
        flush=True,
    )
