"""The runs as charts on one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.page.chart import Chart, Line, Mark, Point
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
            Line(name, [(row["replicas"], of(row)) for row in table if row["goodput_per_s"]], number, has_dots=True)
            for number, (name, table) in enumerate(rows.items())
        ]
        return Chart(title=title, x_label="replicas", y_label=label, lines=lines, x_is_log=True, **more).svg()

    kept = f"first token in {slo.ttft_s:g} s, {1e3 * slo.tpot_s:g} ms a token; where nothing is good, nothing is drawn"
    charts = [
        over("Goodput", "good requests/s", lambda row: row["goodput_per_s"], y_is_log=True, note=kept),
        over("Attainment", "share within SLO", lambda row: row["attainment"], y_is_log=False, y_top=1.0),
        over("TTFT p99", "seconds", lambda row: row["ttft_p99_s"], y_is_log=True),
        over(
            "Cost",
            "replica hours per 1000 good",
            lambda row: row["replica_hours_per_1000_good"],
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


def series(run: Run, slo: Slo, *, end_s: float, begin_hour: float) -> dict[str, list[tuple[float, float]]]:
    """A run over its hours: (hour, value) of what is drawn."""
    bins: dict[int, list[Visit]] = {}
    for visit in run.visits:
        if visit.arrived_s < end_s:
            bins.setdefault(int(visit.arrived_s / BIN_S), []).append(visit)
    requests, attained, ttft = list[Point](), list[Point](), list[Point]()
    for number, visits in sorted(bins.items()):
        at = round(begin_hour + (number + 0.5) * BIN_S / 3600, 3)
        requests.append((at, round(len(visits) / BIN_S, 3)))
        attained.append((at, round(sum(map(slo.holds, visits)) / len(visits), 4)))
        waits = sorted(visit.ttft_s for visit in visits if visit.first_s is not None)
        ttft.append((at, round(quantile(waits, 0.99), 3)))
    return {"requests": requests, "ready": _stairs(run, end_s, begin_hour), "attained": attained, "ttft_p99": ttft}


def _stairs(run: Run, end_s: float, begin_hour: float) -> list[Point]:
    """Replicas that serve: a number stays what it is until it changes. Nothing for a fleet that nobody scales."""
    stairs = list[Point]()
    for moment in run.moments:
        at, num = round(begin_hour + min(moment.at_s, end_s) / 3600, 4), float(moment.num_ready)
        if stairs and stairs[-1][1] != num:
            stairs.append((at, stairs[-1][1]))
        if not stairs or stairs[-1][1] != num or moment is run.moments[-1]:
            stairs.append((at, num))
    return stairs


def day(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Requests, replicas and what clients saw over the hours; a row with `series` for each fleet."""

    def strip(title: str, label: str, lines: Iterable[Line], **more: Any) -> str:
        return Chart(title=title, x_label="hour", y_label=label, lines=[*lines], is_wide=True, **more).svg()

    def each(name: str) -> list[Line]:
        return [Line(row["fleet"], row["series"][name], colour=number) for number, row in enumerate(rows)]

    hours = [point[0] for point in rows[0]["series"]["requests"]]
    replicas = []
    for number, row in enumerate(rows):
        flat = (
            [(hours[0], float(row["fleet"].split()[0])), (hours[-1], float(row["fleet"].split()[0]))] if number else []
        )
        replicas.append(Line(row["fleet"], row["series"]["ready"] or flat, colour=number, is_dashed=bool(flat)))
    return [
        strip("Requests", "a second", [Line("", rows[0]["series"]["requests"])], y_is_log=False),
        strip("Replicas", "serving", replicas, y_is_log=False),
        strip("Within SLO", "share", each("attained"), y_is_log=False, y_top=1.0),
        strip("TTFT p99", "seconds", each("ttft_p99")),
    ]
