"""Which charts a result has, and what they show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from loadtest.measure.figures import CURVE
from loadtest.page.chart import Bars, Chart, Line, Mark, Point

Result = dict[str, Any]
Series = list[tuple[str, list[Result]]]
NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "Text, end to end",
    "ttfp": "Time to first preview",
    "image_e2el": "Image, end to end",
}
GROUP = {"ttfp": "image", "image_e2el": "image"}
RATE = "requests due a second"


def named(results: Sequence[Result]) -> list[str]:
    """A name for each, told apart by rate or place where labels are the same."""
    labels = [str(one["label"]) for one in results]
    if len(set(labels)) == len(labels):
        return labels
    longer = [f"{one['label']}, {one['request_rate']}/s" for one in results]
    return longer if len(set(longer)) == len(longer) else [f"{name} ({at})" for at, name in enumerate(longer, 1)]


def against_rate(results: Sequence[Result]) -> list[Chart]:
    """Latency, goodness and throughput over the rate, where several rates were tried."""
    series = _series(results)
    if not any(len(points) > 1 for _, points in series):
        return []
    rates = [one["max_rate_at_slo"] for one in results if one.get("max_rate_at_slo")]
    found = [Mark(rate, f"{rate:.3g}/s holds", True) for rate in rates] if len(results) == 1 else []
    charts = [_good_share(series, found, results)]
    for metric in ("ttft", "tpot", "e2el", "image_e2el"):
        lines = []
        for colour, (name, points) in enumerate(series):
            for key, is_dashed in ((f"p99_{metric}_ms", False), (f"median_{metric}_ms", True)):
                values = _points(points, metric, "rate", key)
                kind = "p50" if is_dashed else "p99"
                lines.append(Line(f"{name} {kind}".strip(), values, colour, is_dashed, True))
        if any(line.points for line in lines):
            limits = _slo(results, metric)
            charts.append(
                Chart(title=NAMES[metric], x_label=RATE, y_label="ms", lines=lines, y_marks=limits, x_marks=found)
            )
    return charts


def throughput_against_latency(results: Sequence[Result]) -> list[Chart]:
    """What more throughput costs: up and to the left is better."""
    series = _series(results)
    charts = []
    for throughput, unit, metric in (
        ("output_throughput", "output tokens a second", "ttft"),
        ("output_throughput", "output tokens a second", "tpot"),
        ("image_throughput", "images a second", "image_e2el"),
    ):
        lines = []
        for colour, (name, points) in enumerate(series):
            places = [(b, a) for a, b in _points(points, metric, throughput, f"p99_{metric}_ms")]
            lines.append(Line(f"{name} p99".strip(), places, colour, False, True))
        if any(len(line.points) > 1 for line in lines):
            word = NAMES[metric].lower()
            title = f"{unit.capitalize()} against {word}"
            charts.append(
                Chart(title=title, x_label=f"{word}, p99, ms", y_label=unit, lines=lines, x_is_log=True, y_is_log=False)
            )
    return charts


def distributions(results: Sequence[Result]) -> list[Chart]:
    """Of each metric, the share of requests (of gaps, for ITL) that took no longer than so much."""
    charts = []
    for metric, title in NAMES.items():
        lines = []
        for colour, (result, name) in enumerate(zip(results, named(results))):
            for group, own in result["groups"].items():
                curve = own.get(f"curve_{metric}_ms")
                if curve and (group != "probe" or metric == "ttft"):
                    who = [name] if len(results) > 1 else []
                    label = ", ".join([*who, *([] if metric in GROUP else [group])])
                    shade = colour if len(results) > 1 else {"probe": 3}.get(group, 1 if metric in GROUP else 0)
                    lines.append(Line(label, list(zip(curve, CURVE)), shade, group == "probe"))
        if lines:
            charts.append(
                Chart(
                    title=title, x_label="ms, logarithmic", y_label="%", lines=lines, x_is_log=True, y_top=100.0,
                    x_marks=_slo(results, metric), height=220,
                )
            )  # fmt: skip
    return charts


def timelines(result: Result) -> list[Chart]:
    """What was going on in the run."""
    line = result["timeline"]
    width = line["bin_s"]
    colours = {"text": 0, "image": 1, "probe": 3}
    in_flight = [
        Line(f"{group} in flight", _over_time(values, width, shift=1), colours.get(group, 4), False, False, True)
        for group, values in line["in_flight"].items()
        if group != "probe"
    ]
    rate = [(at, value / width) for at, value in _over_time(line["completed"], width)]
    ended = [Bars("completed a second", rate, width, 2)]
    for name, colour in (("errors", "bad"), ("timeouts", 5), ("rejected", 4), ("cancelled", 3)):
        if any(line[name]):
            heights = [(at, value / width) for at, value in _over_time(line[name], width)]
            ended.append(Bars(f"{name} a second", heights, width, colour))
    charts = [_strip("Requests in flight", "requests", lines=in_flight), _strip("Requests that ended", bars=ended)]
    if any(line["output_tokens_per_s"]):
        tokens = Line("", _over_time(line["output_tokens_per_s"], width), 0, False, False, True)
        charts.append(_strip("Output tokens", lines=[tokens]))
    return charts


def _strip(title: str, unit: str = "a second", *, lines: Sequence[Line] = (), bars: Sequence[Bars] = ()) -> Chart:
    """A wide, low chart over the time of the run."""
    return Chart(
        title=title, x_label="seconds", y_label=unit, lines=lines, bars=bars, is_wide=True, height=190, y_is_log=False
    )


def _good_share(series: Series, found: Sequence[Mark], results: Sequence[Result]) -> Chart:
    lines = [
        Line(
            name or "good", sorted({_rate(one): 100 * one["good_share"] for one in points}.items()), colour, False, True
        )
        for colour, (name, points) in enumerate(series)
    ]
    share = results[0].get("min_good")
    wanted = [Mark(100 * share, f"{share:.0%} wanted")] if share else []
    return Chart(
        title="Good requests", x_label=RATE, y_label="% within every limit", lines=lines, y_top=104.0, y_is_log=False,
        x_marks=found, y_marks=wanted, note="a trial that has clearly failed is cut short",
    )  # fmt: skip


def _series(results: Sequence[Result]) -> Series:
    """Runs at several rates: a result's trials, or results that are one load at several rates."""
    with_trials = [(name, one["trials"]) for name, one in zip(named(results), results) if "trials" in one]
    if with_trials:
        return with_trials if len(results) > 1 else [("", with_trials[0][1])]
    return [("", list(results))] if len({one["request_rate"] for one in results}) > 1 else []


def _rate(one: Result) -> float:
    rate = one["request_rate"]
    return float(rate) if isinstance(rate, int | float) else float(one.get("offered_request_rate") or 0.0)


def _points(runs: Sequence[Result], metric: str, x: str, y: str) -> list[Point]:
    found: dict[float, Point] = {}
    for run in runs:
        if run.get("unfinished"):  # cut short: what it has are the requests that were quick
            continue
        own = run["groups"].get(GROUP.get(metric, "text"), {})
        across = _rate(run) if x == "rate" else own.get(x)
        if own.get(y) is not None and across:
            found[_rate(run)] = (float(across), float(own[y]))  # of two runs at a rate the later, which confirms
    return [point for _, point in sorted(found.items())]


def _slo(results: Sequence[Result], metric: str) -> list[Mark]:
    limits = set(chain.from_iterable([one["slo_ms"][metric]] for one in results if metric in one["slo_ms"]))
    return [Mark(limit, f"limit {limit:g} ms") for limit in sorted(limits)]


def _over_time(values: Sequence[float], width: float, shift: int = 0) -> list[Point]:
    return [((at + shift) * width, float(value)) for at, value in enumerate(values)]
