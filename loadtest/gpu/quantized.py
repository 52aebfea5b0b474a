"""What quantised weights and a quantised KV cache bring to decodes of Llama-3.1-8B's shape: weights made in bfloat16 on
the device and quantised there as they are loaded, as `--quantization` does it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from loadtest.gpu.bench import Bench, read_outcome
from loadtest.gpu.driver import Driver
from loadtest.gpu.shapes import TextShape
from loadtest.gpu.text import free, text_options

SETTINGS: tuple[dict[str, Any], ...] = (
    {"quantization": "fp8"},
    {"quantization": "int4"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"quantization": "int8"},
)
TINY_SETTINGS: tuple[dict[str, Any], ...] = ({"quantization": "int8"}, {"kv_cache_dtype": "fp8_e4m3"})
"""Those that a CPU computes too."""
BATCHES = (1, 64, 256)
CONTEXT = 1024


def run(bench: Bench) -> None:
    shape = TextShape.of(is_rehearsal=bench.is_rehearsal)
    batches, context, num_steps = ((2,), 40, 8) if bench.is_rehearsal else (BATCHES, CONTEXT, 32)
    plain = {} if (text := read_outcome(bench.folder, "text")) is None else _rates(text.of_kind("decode"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = shape.write(Path(scratch) / "model")
        for setting in TINY_SETTINGS if bench.is_rehearsal else SETTINGS:
            (name,) = setting.values()
            if not bench.has_time(str(name), 0 if bench.is_rehearsal else 18):
                continue
            with bench.attempt(str(name)):
                _measure(bench, folder, setting, batches, context, num_steps, plain)
            free()


def _measure(
    bench: Bench,
    folder: Path,
    setting: dict[str, Any],
    batches: tuple[int, ...],
    context: int,
    num_steps: int,
    plain: dict[int, float],
) -> None:
    """A row for each batch. `plain`: tokens/s without the setting."""
    driver = Driver(dataclasses.replace(text_options(folder, bench), **setting))
    for batch in batches:
        found = driver.decodes(driver.prompts(batch, context), num_steps)
        bench.row(
            "quantized",
            weights=setting.get("quantization", "as they are"),
            kv=setting.get("kv_cache_dtype", "as it is"),
            batch=batch,
            context=context,
            tok_s=found.tok_s,
            step_ms=1e3 * found.step_s,
            times_faster=found.tok_s / plain[batch] if batch in plain else None,
        )
    driver.close()


def _rates(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Tokens/s by batch."""
    return {row["batch"]: row["tok_s"] for row in rows}
