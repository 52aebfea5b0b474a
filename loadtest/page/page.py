"""One HTML page that tells what was measured: no script, no other file, light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from loadtest.measure.figures import METRICS
from loadtest.page import plots
from loadtest.page.chart import Chart, told
from loadtest.page.words import DEFINITIONS

Result = dict[str, Any]

ROWS = (
    ("Requests sent", "num_prompts", ""),
    ("Answered", "completed", ""),
    ("Failed", "failed", ""),
    ("of these 429", "rejected", ""),
    ("of these timeouts", "timeouts", ""),
    ("Cancelled by the load", "cancelled", ""),
    ("Answers not as asked", "flawed", ""),
    ("Good", "good_share", "%"),
    ("Requests/s", "request_throughput", "+"),
    ("Good requests/s", "request_goodput", "+"),
    ("Output tokens/s", "output_throughput", "+"),
    ("Output tokens/s until the last send", "steady_output_throughput", "+"),
    ("Images/s", "image_throughput", "+"),
    ("Megapixel-steps/s", "megapixel_steps_throughput", "+"),
    ("Most at once", "max_concurrent_requests", ""),
)


def render(results: Sequence[Result]) -> str:
    """Of one result, or several side by side."""
    style = files("loadtest.page").joinpath("style.css").read_text(encoding="utf-8")
    body = [_head(results)]
    if len(results) == 1:
        body.append(_tiles(results[0]))
    else:
        body.append(_comparison(results))
    note = "A point is a run with arrivals at that rate; latencies only of runs that were not cut short."
    charts = [*plots.against_rate(results), *plots.throughput_against_latency(results)]
    body.append(_section("Against the rate", note, charts))
    note = "How many took no longer. The end of a curve is the slowest."
    body.append(_section("Distributions", note, plots.distributions(results)))
    for result, name in zip(results, plots.named(results)):
        title = "Timeline" if len(results) == 1 else f"Timeline of {name}"
        body.append(_section(title, "", plots.timelines(result)))
    if len(results) == 1:
        body.append(_figures(results[0]))
    body.append(_checks(results))
    body.append(_definitions())
    body += [_settings(result, name) for result, name in zip(results, plots.named(results))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(_title(results))}</title><style>\n{style}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _title(results: Sequence[Result]) -> str:
    return f"Load test: {', '.join(plots.named(results))}"


def _head(results: Sequence[Result]) -> str:
    first = results[0]
    models = " and ".join(
        dict.fromkeys(name for one in results for name in (one["model_id"], one["image_model_id"]) if name)
    )
    badges = " ".join(_badge(one) for one in results) if len(results) == 1 else ""
    date = first["date"]
    when = f"{date[:4]}-{date[4:6]}-{date[6:8]} {date[9:11]}:{date[11:13]}"
    title = f"<h1>{escape(_title(results))}</h1>"
    return f'<header>{title}<p class="soft">{escape(models)}, {when}</p><p>{badges}</p></header>'


def _badge(result: Result) -> str:
    found = result["verdict"]
    kind = "good" if found["name"] == "ok" else "warn" if found["exit_status"] in (0, 5) else "bad"
    name, reason = escape(found["name"].replace("_", " ")), escape(found["reason"])
    return f'<span class="verdict {kind}">{name}</span> <span class="soft">{reason}</span>'


def _tiles(result: Result) -> str:
    text, image = result["groups"].get("text", {}), result["groups"].get("image", {})
    tiles = []
    if result.get("max_rate_at_slo") is not None:
        share = f"requests/s, the highest rate with {result['min_good']:.0%} good"
        tiles.append(_tile(told(round(result["max_rate_at_slo"], 2)), share, "head"))
    else:
        tiles.append(_tile(told(round(result["request_throughput"], 2)), "requests/s answered", "head"))
    if result["slo_ms"]:
        tiles.append(_tile(f"{result['good_share']:.1%}", "of the requests good"))
    for own, key, unit, words in (
        (text, "output_throughput", "", "output tokens/s"),
        (text, "p99_ttft_ms", " ms", "TTFT, p99"),
        (text, "p99_tpot_ms", " ms", "TPOT, p99"),
        (image, "image_throughput", "", "images/s"),
        (image, "p99_image_e2el_ms", " ms", "image, p99"),
        (image, "p99_ttfp_ms", " ms", "first preview, p99"),
    ):
        if own.get(key) is not None:
            tiles.append(_tile(_short(own[key]) + unit, words))
    tiles.append(_tile(str(result["failed"]), "failed (errors, 429s, timeouts)"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(value: str, words: str, kind: str = "") -> str:
    return f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def _section(title: str, note: str, charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    drawn = "".join(chart.svg() for chart in charts)
    return f'<section><h2>{escape(title)}</h2>{words}<div class="charts">{drawn}</div></section>'


def _figures(result: Result) -> str:
    groups = list(result["groups"])
    rows = [_row(name, [result["groups"][group].get(key) for group in groups], kind) for name, key, kind in ROWS]
    for metric in METRICS:
        for key in _keys(result, metric):
            name = f"{metric.removeprefix('image_').replace('e2el', 'e2e').upper()} {_word(key)}, ms"
            rows.append(_row(name, [result["groups"][group].get(key) for group in groups], ""))
    head = "".join(f"<th>{escape(group)}</th>" for group in groups)
    table = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    return f'<section><h2>Figures</h2><div class="scroll">{table}</div></section>'


def _row(name: str, values: Sequence[Any], kind: str) -> str:
    if not any(isinstance(value, int | float) and (value or name in ("Failed", "Answered")) for value in values):
        return ""
    cells = "".join(f"<td>{_cell(value, kind)}</td>" for value in values)
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _comparison(results: Sequence[Result]) -> str:
    """A column a result, the best of each row marked, others as multiples of the first."""
    verdicts = "".join(f"<td>{escape(one['verdict']['name'])}</td>" for one in results)
    rows = [f"<tr><td>Verdict</td>{verdicts}</tr>"]
    if any("max_rate_at_slo" in one for one in results):
        rows.append(_compared("Highest rate at SLO, requests/s", [one.get("max_rate_at_slo") for one in results], "+"))
    for group in dict.fromkeys(group for one in results for group in one["groups"]):
        rows.append(f'<tr class="group"><td colspan="{len(results) + 1}">{escape(group)}</td></tr>')
        own = [one["groups"].get(group, {}) for one in results]
        rows += [_compared(name, [one.get(key) for one in own], kind) for name, key, kind in ROWS]
        for metric in METRICS:
            for key in dict.fromkeys(key for one in results for key in _keys(one, metric)):
                name = f"{metric.removeprefix('image_').replace('e2el', 'e2e').upper()} {_word(key)}, ms"
                rows.append(_compared(name, [one.get(key) for one in own], "-"))
    head = "".join(f"<th>{escape(name)}</th>" for name in plots.named(results))
    return (
        '<section><h2>Side by side</h2><p class="note">The best of a row is marked; small figures are multiples of the '
        f'first column.</p><div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div></section>'
    )


def _compared(name: str, values: Sequence[Any], kind: str) -> str:
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or not any(numbers):
        return ""
    best = max(numbers) if kind in ("+", "%") else min(numbers) if kind == "-" else None
    is_even = best is None or len(numbers) < 2 or max(numbers) == min(numbers)
    cells = ""
    for at, value in enumerate(values):
        mark = ' class="best"' if not is_even and value == best else ""
        base = values[0]
        times = (
            f"<small>x{value / base:.2f}</small>"
            if at and kind in ("+", "-") and base and isinstance(value, int | float)
            else ""
        )
        cells += f"<td{mark}>{_cell(value, kind)}{times}</td>"
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _checks(results: Sequence[Result]) -> str:
    rows = []
    for result, name in zip(results, plots.named(results)):
        checks, client = result["checks"], result["client"]
        said = [
            f"{checks['texts']} texts, {checks['wrong_length']} of another length than asked",
            f"{checks['images']} images: {checks['undecodable']} undecodable, {checks['wrong_size']} of a wrong size, "
            f"{checks['blank']} blank",
            f"{checks['repeated']} images asked for twice with the same seed, {checks['different_hash']} differed"
            + (f" (by at most {checks['largest_difference']} of 255 levels)" if checks["different_hash"] else ""),
        ]
        for key, what in (("prompt_tokens_off", "prompt"), ("output_tokens_off", "output")):
            if checks[key] is not None:
                said.append(
                    f"{what} tokens by usage and by tokenizer differ by {checks[key]:.2%}, {checks['counted']} requests"
                )
        if result["queue_share"] is not None:
            said.append(f"{result['queue_share']:.1%} of the requests' time was spent in the server's queues")
        said += [f"{number} x {kind}" for kind, number in result["errors_by_kind"].items()]
        said.append(
            f"client: lag p50 {client['median_client_lag_ms']:.2f} ms, p99 {client['p99_client_lag_ms']:.2f} ms; "
            f"it kept {client['cores']:.2f} cores busy, everything else on its machine {client['other_cores']:.2f}"
        )
        said += checks["notes"]
        title = f"<h3>{escape(name)}</h3>" if len(results) > 1 else ""
        rows.append(title + "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in said) + "</ul>")
    return f"<section><h2>What was checked</h2>{''.join(rows)}</section>"


def _definitions() -> str:
    told_so = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in DEFINITIONS.items())
    return f"<section><h2>What the words mean</h2><dl>{told_so}</dl></section>"


def _settings(result: Result, name: str) -> str:
    kept = {"config": result["config"], "machine": result["machine"]}
    text = escape(json.dumps(kept, indent=1))
    return f"<details><summary>Settings of {escape(name)}</summary><pre>{text}</pre></details>"


def _keys(result: Result, metric: str) -> list[str]:
    """The mean, median and percentiles of a metric that the result has."""
    own = [group for group in result["groups"].values() if f"median_{metric}_ms" in group]
    wanted = [key for key in (own[0] if own else {}) if key.endswith(f"_{metric}_ms")]
    return [key for key in wanted if key.removesuffix(f"_{metric}_ms") not in ("std", "curve", "p50")]


def _word(key: str) -> str:
    return key.split("_")[0]


def _cell(value: Any, kind: str) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:.2%}" if kind == "%" else _short(value)


def _short(value: float) -> str:
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
