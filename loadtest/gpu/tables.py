"""The rows of a part as tables of Markdown, one for each kind of row: for the screen and for the results page alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.gpu.bench import Outcome

_SHARES = {"spread", "roofline", "mfu", "matmul_share", "idle_between", "not_busy", "held", "ceiling", "share"}
"""Columns that are written in percent."""


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: dict[str, str]
    """Column of the rows → heading."""


_WAITS = {"ttft_p50_ms": "TTFT p50, ms", "ttft_p90_ms": "p90", "ttft_p99_ms": "p99"}
_WAITS |= {"itl_p50_ms": "ITL p50, ms", "itl_p90_ms": "p90", "itl_p99_ms": "p99"}
_TOLD = {"error": "error", "microseconds": "µs", "ceiling": "% of the ceiling"}
_DIFFERS = {"what": "what", "model": "model", "differs": "share of requests that differ", "levels": "levels of 255"}
TABLES = {
    "limits": Table(
        "What the card can do", {"what": "what", "gb_s": "GB/s", "tflop_s": "TFLOP/s", "spread": "spread, %"}
    ),
    "correct": Table("Must be equal to the CPU", _DIFFERS),
    "stable": Table("Changed by batching, measured and not promised", _DIFFERS),
    "model": Table(
        "The model that was loaded",
        {
            "parameters": "parameters",
            "dtype": "dtype",
            "kv_cache_tokens": "KV cache, tokens",
            "load_s": "age of the process when it was loaded, s",
        },
    ),
    "decode": Table(
        "Decode",
        {
            "batch": "batch",
            "context": "context",
            "tok_s": "tokens/s",
            "step_ms": "step, ms",
            "p90_ms": "p90",
            "floor_ms": "floor, ms",
            "roofline": "% of the roofline",
        },
    ),
    "prefill": Table(
        "Prefill",
        {
            "prompts": "prompts",
            "tokens": "tokens each",
            "ttft_ms": "all first tokens after, ms",
            "tok_s": "tokens/s",
            "mfu": "MFU, %",
            "matmul_share": "% of the measured matrix rate",
        },
    ),
    "idle": Table(
        "Is the device ever waiting?",
        {
            "batch": "batch",
            "step_ms": "step, ms",
            "profiled_step_ms": "step with the profiler, ms",
            "busy_ms": "busy, ms",
            "idle_between": "waiting for the host, %",
            "not_busy": "in any gap, %",
            "kernels": "kernels",
        },
    ),
    "profile": Table(
        "What a step consists of, its longest parts first",
        {
            "step": "step",
            "name": "kernel",
            "calls": "calls",
            "microseconds": "µs together",
            "share": "% of all that ran",
        },
    ),
    "mixed": Table(
        "Mixed trace",
        {"load": "load", "engine": "engine", "output_tok_s": "output tokens/s", **_WAITS, "config": "its own choice"},
    ),
    "prefix": Table(
        "Prefix cache",
        {
            "prompts": "prompts",
            "shared": "shared tokens",
            "own": "own tokens",
            "without_ms": "nothing shared, ms",
            "with_ms": "shared and cached, ms",
            "times_faster": "times faster",
        },
    ),
    "speculation": Table(
        "Speculation by lookup",
        {
            "batch": "batch",
            "drawn_from": "tokens to draw from",
            "held": "drafts that held, %",
            "without_tok_s": "tokens/s without",
            "with_tok_s": "with",
            "times_faster": "times faster",
        },
    ),
    "quantized": Table(
        "Decodes with quantised weights or KV cache",
        {
            "weights": "weights",
            "kv": "KV cache",
            "batch": "batch",
            "context": "context",
            "tok_s": "tokens/s",
            "step_ms": "step, ms",
            "times_faster": "times bfloat16",
        },
    ),
    "cold": Table(
        "Process start to first token",
        {
            "start": "start",
            "first_token_s": "first token after, s",
            "imports_s": "imports",
            "device_s": "device",
            "weights_s": "weights",
            "cache_and_graphs_s": "cache and first graphs",
            "first_token_itself_s": "first token",
        },
    ),
    "overlap": Table(
        "A decode step of a small model, where the host is all there is",
        {
            "batch": "batch",
            "drawn": "tokens",
            "host_us": "step, µs",
            "synchronisations": "synchronising calls",
            "first": "the first of them",
            "copies_in": "copies to the device",
            "copies_out": "copies to the host",
            "kernels": "kernels",
        },
    ),
    "kernel": Table(
        "Kernels",
        {"kernel": "kernel", "shape": "shape", **_TOLD, "times_faster": "times plain torch", "failure": "failure"},
    ),
    "attention": Table(
        "Attention, one layer",
        {"phase": "phase", "shape": "shape", "kv": "KV cache", "backend": "backend", **_TOLD, "failure": "failure"},
    ),
    "sampler": Table(
        "Sampler, logits of 128,256 tokens",
        {
            "sampling": "sampling",
            "rows": "rows",
            "error": "share of rows with another token than on CPU",
            "microseconds": "µs",
            "ceiling": "% of the ceiling",
            "times_faster": "times plain torch",
            "failure": "failure",
        },
    ),
    "images": Table(
        "Denoise steps",
        {
            "model": "model",
            "how": "how",
            "rows": "rows",
            "step_ms": "step, ms",
            "matmul_share": "% of the measured matrix rate",
            "row_steps_s": "rows/s",
            "steps": "steps",
            "images_s": "images/s",
        },
    ),
}


def tables_of(outcome: Outcome) -> list[str]:
    """One for each kind of row there is, with its title; columns that no row fills are left out."""
    kinds = dict.fromkeys(row["kind"] for row in outcome.rows)
    return [markdown(TABLES[kind], outcome.of_kind(kind)) for kind in kinds]


def markdown(table: Table, rows: list[dict[str, Any]]) -> str:
    columns = {
        name: heading for name, heading in table.columns.items() if any(row.get(name) not in (None, "") for row in rows)
    }
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(name, row.get(name)) for name in columns) + " |" for row in rows),
    ]
    return f"**{table.title}**\n\n" + "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if name == "error":
        return f"{value:.1e}"
    if name in _SHARES:
        return f"{100 * value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def told(outcome: Outcome) -> str:
    """A part for the screen: its tables, what it left out, how it ended."""
    lines = ["", *tables_of(outcome)]
    lines += [f"left out: {what}" for what in outcome.skipped]
    if outcome.state != "done":
        lines.append(f"{outcome.part}: {outcome.state}: {outcome.error}")
    if outcome.is_rehearsal:
        lines.append("a rehearsal on the CPU: no figure of this is a measurement")
    return "\n".join(lines)
