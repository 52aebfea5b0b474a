"""Fleets in virtual time: what thousands of replicas and a day's requests would do.

    python -m loadtest.simulate calibrate           measured runs of 1, 2 and 4 paced replicas, and the same simulated
    python -m loadtest.simulate calibrate --real    one real engine instead (tandem-text on this CPU)
    python -m loadtest.simulate costs               what gateway and hub take of a core, measured
    python -m loadtest.simulate scale               goodput and cost of 10 to 1000 replicas; what is busy first
    python -m loadtest.simulate day                 a day with autoscaling, against a fixed fleet

Router, scheduler, KV cache, pace and autoscaling are the code that serves; devices are a time per step. Prints tables
and RESULT lines; `--page FILE` draws, `--out FILE` appends the lines. How it works and how far it is right:
`loadtest/results/simulator.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from loadtest.paced import TextDevice
from loadtest.report import Report
from loadtest.simulator import drawn
from loadtest.simulator.calibrate import Comparison, compare
from loadtest.simulator.costs import Costs
from loadtest.simulator.figures import Slo
from loadtest.simulator.fleet import FleetOptions
from loadtest.simulator.measured_costs import measure_costs
from loadtest.simulator.runs import run
from loadtest.simulator.samples import Fit
from loadtest.simulator.sweep import Sweep, at_size
from loadtest.simulator.visit import Visit
from loadtest.simulator.workload import DAY_S, Lengths, day, recorded
from loadtest.traffic.traces import read_trace
from serve.options import AutoscalingOptions

DEVICE = TextDevice(base_s=0.020, row_s=0.0002, unit_s=0.0002, kv_cache_tokens=163_840)
"""About an 8B model on a small GPU: 5000 prompt tokens/s, 20 ms a decode step. Stated, not measured."""
REAL = TextDevice(
    base_s=0.0, row_s=0.0, unit_s=0.0, kv_cache_tokens=131_072, max_num_seqs=256, max_num_batched_tokens=1024
)
"""Sizes of `tandem-text` as it is served on a CPU; its times are fitted."""

ALL = 1 << 30
EARLIER = "lines that --out has written: drawn and printed too"


def main() -> None:
    arguments = _parser().parse_args()
    report = Report(arguments.out)
    arguments.run(arguments, report)


async def calibrate(arguments: argparse.Namespace, report: Report) -> None:
    real = arguments.real
    fitted = None if arguments.fitted is None else Fit(_device(arguments.fitted), 0, 0.0, 0.0)
    lengths = Lengths(prompt_median=arguments.prompt, output_median=arguments.output, most_prompt=3000)
    comparisons: list[Comparison] = []
    for num_replicas in [1] if real else arguments.replicas:
        fitted, comparison = await compare(
            fitted,
            num_replicas=num_replicas,
            rate=arguments.rate,
            seconds=arguments.seconds,
            lengths=lengths,
            costs=Costs(),
            like=REAL if real else arguments.device,
            paced=not real,
            model="tandem-text",
            seed=arguments.seed,
        )
        comparisons.append(comparison)
        for row in comparison.rows():
            report(benchmark="simulator", what="calibration", devices="real" if real else "paced", **row)
    assert fitted is not None
    report(benchmark="simulator", what="fit", **dataclasses.asdict(fitted))
    _table([row for comparison in comparisons for row in comparison.rows()])


async def costs(arguments: argparse.Namespace, report: Report) -> None:
    measured = await measure_costs()
    report(
        benchmark="simulator", what="costs", **{k: float(f"{v:.3g}") for k, v in dataclasses.asdict(measured).items()}
    )


def scale(arguments: argparse.Namespace, report: Report) -> None:
    rows: dict[str, list[dict[str, Any]]] = _earlier(arguments.earlier, "scale")
    base = Sweep(
        device=arguments.device,
        lengths=Lengths(),
        costs=Costs(),
        slo=Slo(),
        rate=arguments.rate,
        warm_s=arguments.warm,
        seconds=arguments.seconds,
        replicas_per_gateway=arguments.replicas_per_gateway,
        seed=arguments.seed,
    )
    many = f"a gateway for {arguments.replicas_per_gateway:g} replicas"
    for name, sweep, most in (
        ("one gateway", dataclasses.replace(base, replicas_per_gateway=None), arguments.most_for_one),
        (many, base, max(arguments.replicas, default=0)),
        *(
            (f"{many}, {num or 'all'} drawn", dataclasses.replace(base, num_drawn=num or ALL), arguments.most_drawn)
            for num in arguments.drawn
        ),
    ):
        for num_replicas in [num for num in arguments.replicas if num <= most]:
            _, row = at_size(sweep, num_replicas)
            rows.setdefault(name, []).append(row)
            report(benchmark="simulator", what="scale", gateways_are=name, **row)
    for name, table in rows.items():
        table.sort(key=lambda row: row["replicas"])
        print(f"\n{name}")
        _table([{key: value for key, value in row.items() if key != "loads"} for row in table])
    _page(arguments.page, "Fleets of 10 to 1000 replicas", drawn.scale(rows, Slo()))


def day_run(arguments: argparse.Namespace, report: Report) -> None:
    slo, end_s = Slo(ttft_s=arguments.slo_ttft, tpot_s=arguments.slo_tpot), arguments.hours * 3600.0
    rows = _earlier(arguments.earlier, "day").get("", [])
    for name, options in _plans(arguments).items():
        done = run(_requests(arguments, end_s), options, begin_s=0.0, end_s=end_s, slo=slo, seed=arguments.seed)
        row = {
            "fleet": name,
            "requests": done.figures.requests,
            "refused": done.figures.refused,
            "attainment": done.figures.attainment,
            "ttft_p50_s": done.figures.ttft_p50_s,
            "ttft_p99_s": done.figures.ttft_p99_s,
            "tpot_p99_s": done.figures.tpot_p99_s,
            "replica_hours": done.replica_hours,
            "replica_hours_per_1000_good": 1000 * done.replica_hours / max(1.0, done.figures.goodput_per_s * end_s),
            "changes": sum(before.num_wanted != after.num_wanted for before, after in pairwise(done.moments)),
            "series": drawn.series(done, slo, end_s=end_s, begin_hour=arguments.begin_hour),
        }
        rows.append(row)
        report(benchmark="simulator", what="day", **row)
    _table([{key: value for key, value in row.items() if key != "series"} for row in rows])
    if rows:
        _page(arguments.page, "A day", drawn.day(rows))


def _plans(arguments: argparse.Namespace) -> dict[str, FleetOptions]:
    """The fleets that are compared: scaled by the rule, and fixed ones."""
    base = FleetOptions(
        device=arguments.device,
        num_replicas=arguments.initial,
        num_gateways=arguments.gateways,
        load_s=arguments.load_time,
    )
    scaling = AutoscalingOptions(
        max_replicas=arguments.most, initial_replicas=arguments.initial, target_wait_s=arguments.target_wait
    )
    plans = {} if arguments.earlier else {"autoscaling": dataclasses.replace(base, autoscaling=scaling)}
    return plans | {f"{num} fixed": dataclasses.replace(base, num_replicas=num) for num in arguments.fixed}


def _requests(arguments: argparse.Namespace, end_s: float) -> Iterator[Visit]:
    if arguments.trace:
        return recorded(read_trace("azure", Path(arguments.trace)), arguments.speed)
    begin_s = arguments.begin_hour * 3600.0
    lengths = Lengths(
        prompt_median=arguments.prompt, output_median=arguments.output, most_prompt=16_384, most_output=4096
    )
    return day(arguments.peak, lengths, seed=arguments.seed, begin_s=begin_s, end_s=begin_s + end_s)


def _earlier(path: str | None, what: str) -> dict[str, list[dict[str, Any]]]:
    """Rows that an earlier command has written to a file, by what is said of their gateways."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in Path(path).read_text().splitlines() if path else ():
        row = json.loads(line)
        if row.pop("what") == what:
            del row["benchmark"]
            rows.setdefault(row.pop("gateways_are", ""), []).append(row)
    return rows


def _page(path: str | None, title: str, charts: Sequence[str]) -> None:
    if path:
        Path(path).write_text(drawn.page(title, charts), encoding="utf-8")


def _table(rows: Sequence[dict[str, Any]]) -> None:
    """Columns of all rows, as wide as they need."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_told(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _device(text: str) -> TextDevice:
    """JSON of the fields that differ from the default's, or a file with a `fit` line of `calibrate`."""
    if text.lstrip().startswith("{"):
        return dataclasses.replace(DEVICE, **json.loads(text))
    lines = [json.loads(line) for line in Path(text).read_text().splitlines()]
    return TextDevice(**next(line["device"] for line in reversed(lines) if line.get("what") == "fit"))


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.simulate", description=(__doc__ or "").split("\n")[0])
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", type=_device, default=DEVICE, help="JSON, or a file with a fitted one")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--page", help="draw into this file")
    shared.add_argument("-o", "--out", help="append the lines to this file too")
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("calibrate", parents=[shared])
    one.add_argument("--replicas", type=_sizes, default=[1, 2, 4])
    one.add_argument("--real", action="store_true", help="a real engine, one replica")
    one.add_argument("--fitted", help="a file with a fit of an earlier run, which predicts all of these")
    one.add_argument("--rate", type=float, default=1.6, help="requests a second and replica")
    one.add_argument("--seconds", type=float, default=20.0)
    one.add_argument("--prompt", type=float, default=800.0, help="median tokens")
    one.add_argument("--output", type=float, default=60.0, help="median tokens")
    one.set_defaults(run=lambda arguments, report: asyncio.run(calibrate(arguments, report)))

    two = commands.add_parser("costs", parents=[shared])
    two.set_defaults(run=lambda arguments, report: asyncio.run(costs(arguments, report)))

    three = commands.add_parser("scale", parents=[shared])
    three.add_argument("--replicas", type=_sizes, default=[10, 30, 100, 300, 1000])
    three.add_argument("--rate", type=float, default=1.8, help="requests a second and replica")
    three.add_argument("--warm", type=float, default=20.0)
    three.add_argument("--seconds", type=float, default=20.0)
    three.add_argument("--replicas-per-gateway", type=float, default=8.0)
    three.add_argument("--most-for-one", type=int, default=300, help="replicas behind a single gateway")
    three.add_argument(
        "--drawn", type=_sizes, default=[0], help="other numbers of replicas that gateways draw; 0: they look at all"
    )
    three.add_argument("--most-drawn", type=int, default=1000, help="replicas in the runs of --drawn")
    three.add_argument("--earlier", help=EARLIER)
    three.set_defaults(run=scale)

    four = commands.add_parser("day", parents=[shared])
    four.add_argument("--peak", type=float, default=5.0, help="requests a second in the busiest hour")
    four.add_argument("--trace", help="a file in the shape of Azure's LLM inference traces, instead")
    four.add_argument("--speed", type=float, default=1.0, help="of the trace")
    four.add_argument("--hours", type=float, default=DAY_S / 3600)
    four.add_argument("--begin-hour", type=float, default=0.0)
    four.add_argument("--initial", type=int, default=2)
    four.add_argument("--most", type=int, default=64)
    four.add_argument("--fixed", type=_sizes, default=[8], help="fixed fleets to compare with")
    four.add_argument("--earlier", help=EARLIER + "; only the fixed fleets are run")
    four.add_argument("--prompt", type=float, default=4000.0, help="median tokens")
    four.add_argument("--output", type=float, default=300.0, help="median tokens")
    four.add_argument("--slo-ttft", type=float, default=6.0, help="seconds")
    four.add_argument("--slo-tpot", type=float, default=0.1, help="seconds")
    four.add_argument("--target-wait", type=float, default=2.0, help="of the autoscaling rule, seconds")
    four.add_argument("--gateways", type=int, default=2)
    four.add_argument("--load-time", type=float, default=60.0, help="seconds until a new replica serves")
    four.set_defaults(run=day_run)
    return parser


if __name__ == "__main__":
    main()
