"""What a run leaves: one JSON file with everything in figures, one line of JSON a request, one page to look at."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from loadtest.measure.checks import Report
from loadtest.measure.driver import Run
from loadtest.measure.figures import METRICS, client_figures, figures, timeline
from loadtest.measure.outcome import Outcome
from loadtest.measure.slo import Slo
from loadtest.measure.verdict import Verdict

GROUPS = ("text", "image", "probe")
UNTOLD = ("api_key", "header", "result_dir", "result_filename", "save_result", "save_detailed", "progress")
"""Flags that are secret, or say nothing about the load."""


def assemble(
    args: argparse.Namespace,
    run: Run,
    slo: Slo,
    report: Report,
    verdict: Verdict,
    rate: float,
    queue_s: dict[str, float],
) -> dict[str, Any]:
    """The result of one run. `queue_s`: seconds spent in the server's queues by model, where it tells."""
    main = [one for one in run.outcomes if one.group != "probe"]
    groups = [group for group in GROUPS if any(one.group == group for one in run.outcomes)]
    percentiles = args.metric_percentiles
    told: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S", time.localtime(run.began)),
        "backend": args.backend,
        "label": args.label or args.backend,
        "model_id": args.model,
        "image_model_id": args.image_model,
        "dataset_name": args.dataset_name,
        "request_rate": _finite(rate),
        "offered_request_rate": _offered(main),
        "burstiness": _finite(args.burstiness),
        "max_concurrency": args.max_concurrency,
        **figures(main, run.duration_s, slo, percentiles),
        "groups": {
            group: figures([one for one in run.outcomes if one.group == group], run.duration_s, slo, percentiles)
            for group in groups
        },
        "slo_ms": dict(slo.limits_ms),
        "verdict": {"name": verdict.name, "exit_status": verdict.status, "reason": verdict.reason},
        "checks": {name: getattr(report, name) for name in report.__dataclass_fields__},
        "queue_share": _queue_share(run, queue_s),
        "client": {**client_figures(run.outcomes), "cores": run.client_cores, "other_cores": run.other_cores},
        "timeline": timeline(run.outcomes, run.duration_s),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "config": _config(args),
    }
    if args.save_detailed:
        told |= detailed(run)
    return told


def detailed(run: Run) -> dict[str, list[Any]]:
    """The lists that `vllm bench serve --save-detailed` writes, an entry a request."""
    ones = [one for one in run.outcomes if one.group != "probe"]
    return {
        "input_lens": [one.prompt_tokens for one in ones],
        "output_lens": [one.output_tokens for one in ones],
        "ttfts": [one.ttft or 0.0 for one in ones],
        "itls": [one.itls for one in ones],
        "latencies": [one.e2e for one in ones],
        "start_times": [one.sent for one in ones],
        "queue_times": [one.lag for one in ones],
        "generated_texts": ["".join(one.text) for one in ones],
        "errors": [one.error for one in ones],
    }


def write(args: argparse.Namespace, result: dict[str, Any], run: Run, page: str) -> list[Path]:
    """The three files, next to each other; returns their paths."""
    folder = Path(args.result_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (args.result_filename or _file_name(args, result))
    rows, html = file.with_suffix(".jsonl"), file.with_suffix(".html")
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows.write_text("".join(json.dumps(one.row()) + "\n" for one in run.outcomes), encoding="utf-8")
    html.write_text(page, encoding="utf-8")
    return [file, rows, html]


def table(result: dict[str, Any], metrics: str) -> str:
    """The figures as text, a line each, as `vllm bench serve` prints them."""
    lines = ["{:=^62}".format(" Load Test Result ")]
    for name, key, form in _LINES:
        if isinstance(result.get(key), int | float):
            lines.append(f"{name + ':':<42}{format(result[key], form):>20}")
    for group, own in result["groups"].items():
        for metric in METRICS:
            if metric in metrics.split(",") and f"median_{metric}_ms" in own:
                lines.append("{:-^62}".format(f" {group}: {metric.removeprefix('image_').upper()} (ms) "))
                keys = [key for key in own if re.fullmatch(rf"(mean|median|p[\d.]+)_{metric}_ms", key)]
                lines += [f"{key.split('_')[0].capitalize() + ':':<42}{own[key]:>20.2f}" for key in keys]
    lines += [f"{'Error, ' + kind:<54.54}{number:>8}" for kind, number in result["errors_by_kind"].items()]
    lines.append(f"Verdict: {result['verdict']['name']}: {result['verdict']['reason']}")
    return "\n".join([*lines, "=" * 62])


_LINES = (
    ("Successful requests", "completed", "d"),
    ("Failed requests (429s and timeouts too)", "failed", "d"),
    ("Answered 429", "rejected", "d"),
    ("Timeouts", "timeouts", "d"),
    ("Cancelled by the load", "cancelled", "d"),
    ("Request rate configured (RPS)", "request_rate", ".2f"),
    ("Maximum request concurrency", "max_concurrency", "d"),
    ("Benchmark duration (s)", "duration", ".2f"),
    ("Total input tokens", "total_input_tokens", "d"),
    ("Total generated tokens", "total_output_tokens", "d"),
    ("Request throughput (req/s)", "request_throughput", ".2f"),
    ("Request goodput (req/s)", "request_goodput", ".2f"),
    ("Good requests (share)", "good_share", ".4f"),
    ("Output token throughput (tok/s)", "output_throughput", ".2f"),
    ("The same until the last send (tok/s)", "steady_output_throughput", ".2f"),
    ("Total token throughput (tok/s)", "total_token_throughput", ".2f"),
    ("Images (images/s)", "image_throughput", ".2f"),
    ("Megapixel-steps/s", "megapixel_steps_throughput", ".3f"),
    ("Peak concurrent requests", "max_concurrent_requests", "d"),
    ("Share of the time spent in queues", "queue_share", ".3f"),
)


def _offered(main: list[Outcome]) -> float | None:
    """Requests a second that were due, between the first and the last."""
    if len(main) < 2:
        return None
    span = max(one.scheduled for one in main) - min(one.scheduled for one in main)
    return (len(main) - 1) / span if span else None


def _queue_share(run: Run, queue_s: dict[str, float]) -> float | None:
    """Of all requests' time from being sent to the last byte, by the server's own metric."""
    waited = sum(one.end - one.sent for one in run.outcomes if one.is_ok)
    return sum(queue_s.values()) / waited if queue_s and waited else None


def _config(args: argparse.Namespace) -> dict[str, Any]:
    return {name: _finite(value) for name, value in vars(args).items() if name not in UNTOLD}


def _finite(value: Any) -> Any:
    """JSON has no infinity; vLLM writes the word."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _file_name(args: argparse.Namespace, result: dict[str, Any]) -> str:
    at_once = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    model = re.sub(
        r"[^\w.-]+", "-", (result["model_id"] or result["image_model_id"] or "model").strip("/").split("/")[-1]
    )
    return f"{result['label']}-{result['request_rate']}qps{at_once}-{model}-{result['date']}.json"
