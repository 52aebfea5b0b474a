"""What a decode step costs the host, and whether it ever waits for the device: copies, kernels and synchronising calls
of a step, counted, with a model so small that the host is all there is to time.

Synchronising calls are those that torch's sync-debug mode warns of. Waiting for the event behind the copy of the
tokens is not one of them: that is how the host learns what was drawn, a step late.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu.bench import Bench, WrongResult
from loadtest.gpu.correct import write_checkpoint
from loadtest.gpu.driver import Driver
from loadtest.gpu.occupancy import occupancy, watch
from serve.options import ModelOptions

BATCHES = (1, 64, 256)
_NUM_STEPS = 32


def run(bench: Bench) -> None:
    """Raises WrongResult when a decode step synchronises."""
    batches = (1, 4) if bench.is_rehearsal else BATCHES
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), "llama")
        options = ModelOptions(
            model=str(folder),
            device=bench.device.type,  # type: ignore[arg-type]
            threads=1 if bench.is_rehearsal else None,
            kv_cache_memory_bytes=(8 if bench.is_rehearsal else 512) << 20,
        )
        driver = Driver(options)
        waits = [_measure(bench, driver, batch, temperature) for batch in batches for temperature in (0.0, 1.0)]
    if any(waits):
        raise WrongResult(f"decode steps wait for the device: {max(waits):g} synchronising calls a step")


def _measure(bench: Bench, driver: Driver, batch: int, temperature: float) -> float:
    """One row; synchronising calls a step."""
    prompts = [[3 + (7 * i + j) % 500 for j in range(16)] for i in range(batch)]
    found = driver.decodes(prompts, _NUM_STEPS, temperature=temperature)
    columns: dict[str, Any] = {"batch": batch, "drawn": "sampled" if temperature else "greedy"}
    columns["host_us"] = 1e6 * found.step_s
    if bench.is_rehearsal:
        bench.row("overlap", **columns)
        return 0.0
    for prompt in prompts:
        driver.submit(prompt, 4 * _NUM_STEPS, temperature=temperature)
    for _ in range(_NUM_STEPS):
        driver.engine.step()
    with synchronising_calls() as calls:
        for _ in range(_NUM_STEPS):
            driver.engine.step()
    seen = occupancy(watch(driver.engine.step, _NUM_STEPS), _NUM_STEPS)
    driver.run()
    columns |= {"copies_in": seen.copies_in, "copies_out": seen.copies_out, "kernels": seen.kernels}
    bench.row("overlap", **columns, synchronisations=len(calls) / _NUM_STEPS, first=calls[0] if calls else "")
    return len(calls) / _NUM_STEPS


@contextmanager
def synchronising_calls() -> Iterator[list[str]]:
    """Filled, at the end, with what waited for the device meanwhile, by torch's own words and the line it was at."""
    calls: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield calls
        finally:
            torch.cuda.set_sync_debug_mode("default")
            calls += [
                f"{Path(warning.filename).name}:{warning.lineno}"
                for warning in caught
                if "synchroniz" in str(warning.message)
            ]
