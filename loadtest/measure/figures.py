"""The figures of a run, under the names that `vllm bench serve` gives them; what is ours is named beside.

Throughputs divide by the time from the start to the last answer, as there. `steady_output_throughput` counts only the
tokens that came until the last request was sent: without the tail in which the server runs empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest.measure.outcome import Outcome, Status
from loadtest.measure.slo import Slo, good_share, judged
from loadtest.traffic.ask import ImageAsk

CURVE = (0, 1, 2, 5, *range(10, 90, 4), 90, 92, 94, 95, 96, 97, 98, 99, 99.5, 99.9, 100)
"""Percentiles kept of each distribution, so that a result file alone can draw it."""
METRICS = ("ttft", "tpot", "itl", "e2el", "ttfp", "image_e2el")


def figures(outcomes: Sequence[Outcome], duration_s: float, slo: Slo, percentiles: Sequence[float]) -> dict[str, Any]:
    """Of one group of requests, or of several together."""
    ok = [outcome for outcome in outcomes if outcome.is_ok]
    images = [outcome for outcome in ok if isinstance(outcome.ask, ImageAsk)]
    states = Counter(outcome.status for outcome in outcomes)
    span = duration_s or 1e-9
    num_in, num_out = sum(one.prompt_tokens for one in ok), sum(one.output_tokens for one in ok)
    told: dict[str, Any] = {
        "duration": duration_s,
        "num_prompts": len(outcomes),
        "completed": len(ok),
        "failed": states[Status.ERROR] + states[Status.TIMEOUT] + states[Status.REJECTED],
        "rejected": states[Status.REJECTED],
        "timeouts": states[Status.TIMEOUT],
        "cancelled": states[Status.CANCELLED],
        "unfinished": states[Status.UNFINISHED],
        "flawed": sum(bool(one.flaw) for one in ok),
        "errors_by_kind": dict(Counter(one.error for one in outcomes if one.error).most_common(20)),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "total_cached_tokens": sum(one.cached_tokens for one in ok),
        "request_throughput": len(ok) / span,
        "request_goodput": sum(map(slo.is_good, judged(outcomes))) / span if slo.limits_ms else None,
        "good_share": good_share(outcomes, slo) if judged(outcomes) else None,
        "output_throughput": num_out / span,
        "steady_output_throughput": _steady(ok),
        "total_token_throughput": (num_in + num_out) / span,
        "max_concurrent_requests": _most_at_once(outcomes),
    }
    if images:
        told["images"] = sum(len(one.pictures) for one in images)
        told["image_throughput"] = told["images"] / span
        told["megapixel_steps_throughput"] = sum(one.megapixel_steps for one in images) / span
    for name, values in samples(ok).items():
        told |= _distribution(name, values, percentiles)
    return told


def samples(ok: Sequence[Outcome]) -> dict[str, list[float]]:
    """The values of each metric in seconds; those without any are left out."""
    texts = [one for one in ok if not isinstance(one.ask, ImageAsk)]
    images = [one for one in ok if isinstance(one.ask, ImageAsk)]
    found: dict[str, list[float]] = {
        "ttft": [one.ttft for one in texts if one.ttft is not None],
        "tpot": [one.tpot for one in texts if one.tpot is not None],
        "itl": [gap for one in texts for gap in one.itls],
        "e2el": [one.e2e for one in texts],
        "ttfp": [one.ttfp for one in images if one.ttfp is not None],
        "image_e2el": [one.e2e for one in images],
    }
    return {name: values for name, values in found.items() if values}


def client_figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How late requests were sent, in milliseconds."""
    lags = [outcome.lag * 1e3 for outcome in outcomes if outcome.sent] or [0.0]
    median, high = np.percentile(lags, [50, 99])
    return {"median_client_lag_ms": float(median), "p99_client_lag_ms": float(high), "max_client_lag_ms": max(lags)}


def timeline(outcomes: Sequence[Outcome], duration_s: float, num_bins: int = 80) -> dict[str, Any]:
    """What was going on, in equal parts of the run: requests in flight by group at each part's end, and what came."""
    width = max(0.2, duration_s / num_bins)
    edges = np.arange(0.0, duration_s + width, width)

    def counted(times: list[float], weights: list[float] | None = None) -> list[float]:
        return [round(float(value), 2) for value in np.histogram(times, edges, weights=weights)[0]]

    groups = sorted({outcome.group for outcome in outcomes})
    in_flight = {}
    for group in groups:
        mine = [one for one in outcomes if one.group == group]
        begun = np.searchsorted(np.sort([one.scheduled for one in mine]), edges[1:], side="right")
        ended = np.searchsorted(np.sort([one.end or duration_s for one in mine]), edges[1:], side="right")
        in_flight[group] = [int(value) for value in begun - ended]
    by_status = {
        name: counted([one.end for one in outcomes if one.status is status])
        for name, status in (("completed", Status.OK), ("errors", Status.ERROR), ("rejected", Status.REJECTED),
                             ("timeouts", Status.TIMEOUT), ("cancelled", Status.CANCELLED))
    }  # fmt: skip
    tokens = [(at, one.output_tokens / len(one.contents)) for one in outcomes for at in one.contents]
    rates = counted([at for at, _ in tokens], [weight / width for _, weight in tokens])
    return {"bin_s": width, "in_flight": in_flight, **by_status, "output_tokens_per_s": rates}


def _distribution(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, Any]:
    ms = np.asarray(values) * 1e3
    told = {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms))}
    told[f"std_{name}_ms"] = float(ms.std())
    told |= {f"p{_plain(p)}_{name}_ms": float(np.percentile(ms, p)) for p in percentiles}
    curve = np.percentile(ms, CURVE)
    return {**told, f"curve_{name}_ms": [round(float(value), 4) for value in curve]}


def _steady(ok: Sequence[Outcome]) -> float:
    """Output tokens a second between the first and the last send. A piece of output has an equal share of the
    request's tokens."""
    if not ok:
        return 0.0
    begin, end = min(one.scheduled for one in ok), max(one.scheduled for one in ok)
    tokens = sum(
        one.output_tokens / len(one.contents) for one in ok if one.contents for at in one.contents if at <= end
    )
    return tokens / (end - begin) if end > begin else 0.0


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    changes = [(one.sent, 1) for one in outcomes] + [(one.end, -1) for one in outcomes]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def _plain(percentile: float) -> str:
    return f"{percentile:g}"
