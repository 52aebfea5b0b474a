"""The runs as charts on one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.page.chart import Chart, Line, Mark
from loadtest.simulator.figures import Slo, quantile
from loadtest.simulator.runs import Run
from loadtest.simulator.visit import Visit

STYLE = Path(__file__).parent.parent / "page" / "style.css"
BIN_S = 600.0

Rows = list[dict[str, Any]]


def page(title: str, charts: Sequence[str]) -> str:
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<main><h1>{escape(title)}</h1><p>Simulated in virtual time; the devices are a stated time per step.</p>"
        f'<div class="charts">{"".join(charts)}</div></main></html>'
    )


def scale(rows: dict[str, Rows], slo: Slo) -> list[str]:
    """Goodput, attainment, cost and load over the number of replicas."""

    def over(title: str, label: str, of: Callable[[dict[str, Any]], float], **more: Any) -> str:
        lines = [
            Line(name, [(row["replicas"], of(row)) for row in table], colour=number, has_dots=True)
            for number, (name, table) in enumerate(rows.items())
        ]
        return Chart(title=title, x_label="replicas", y_label=label, lines=lines, x_is_log=True, **more).svg()

    kept = f"first token in {slo.ttft_s:g} s, {1e3 * slo.tpot_s:g} ms a token"
    charts = [
        over("Goodput", "good requests/s", lambda row: row["goodput_per_s"], y_is_log=True, note=kept),
        over("Attainment", "share within SLO", lambda row: row["attainment"], y_is_log=False, y_top=1.0),
        over("TTFT p99", "seconds", lambda row: row["ttft_p99_s"], y_is_log=True),
        over(
            "Cost",
            "replica hours per 1000 good",
            lambda row: min(10.0, row["replica_hours_per_1000_good"]),
            y_is_log=True,
        ),
    ]
    for name, table in rows.items():
        parts = dict.fromkeys(part for row in table for part in row["loads"])
        lines = [
            Line(part, [(row["replicas"], row["loads"][part]) for row in table], colour=number, has_dots=True)
            for number, part in enumerate(parts)
        ]
        charts.append(
            Chart(
                title=f"What is busy: {name}", x_label="replicas", y_label="share of one core", lines=lines,
                x_is_log=True, y_is_log=True, y_marks=[Mark(1.0, "full")],
            ).svg()
        )  # fmt: skip
    return charts


def day(runs: dict[str, Run], slo: Slo, *, end_s: float, begin_hour: float) -> list[str]:
    """Requests, replicas and what clients saw over the hours."""
    first = next(iter(runs.values()))

    def strip(title: str, label: str, lines: Iterable[Line], **more: Any) -> str:
        return Chart(title=title, x_label="hour", y_label=label, lines=[*lines], is_wide=True, **more).svg()

    def hour(at_s: float) -> float:
        return begin_hour + at_s / 3600

    def binned(visits: Iterable[Visit], told: Callable[[list[Visit]], float]) -> list[tuple[float, float]]:
        bins: dict[int, list[Visit]] = {}
        for visit in visits:
            if visit.arrived_s < end_s:
                bins.setdefault(int(visit.arrived_s / BIN_S), []).append(visit)
        return [(hour((number + 0.5) * BIN_S), told(bins[number])) for number in sorted(bins)]

    def attained(visits: list[Visit]) -> float:
        return sum(map(slo.holds, visits)) / len(visits)

    def ttft_p99(visits: list[Visit]) -> float:
        return quantile(sorted(visit.ttft_s for visit in visits if visit.first_s is not None), 0.99)

    ready = [(hour(moment.at_s), float(moment.num_ready)) for moment in first.moments if moment.at_s <= end_s]
    fixed = [
        Line(name, [(hour(0), fleet), (hour(end_s), fleet)], colour=number, is_dashed=True)
        for number, name in enumerate(runs)
        if number and (fleet := float(name.split()[0]))
    ]
    return [
        strip(
            "Requests", "a second", [Line("", binned(first.visits, lambda visits: len(visits) / BIN_S))], y_is_log=False
        ),
        strip("Replicas", "serving", [Line("autoscaling", ready), *fixed], y_is_log=False),
        strip(
            "Within SLO",
            "share",
            [
                Line(name, binned(one.visits, attained), colour=number)
                for number, (name, one) in enumerate(runs.items())
            ],
            y_is_log=False,
            y_top=1.0,
        ),
        strip(
            "TTFT p99",
            "seconds",
            [
                Line(name, binned(one.visits, ttft_p99), colour=number)
                for number, (name, one) in enumerate(runs.items())
            ],
        ),
    ]
