"""How long a denoise step takes for how many rows, and how many images a second that makes: DiT-XL/2 in the image
engine at 256 x 256 and 512 x 512 pixels, FLUX.1-dev's shape at 1024 x 1024. Random weights; each row an image of its
own without guidance (a guided one is two rows).

A step's time is the difference of a long and a short run by that of their steps: loading, the first steps and decoding
fall out. Images/s are of the long run, the VAE included. FLUX is the transformer alone, called as diffusers calls it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from loadtest.dummy_dit import DIT_XL_2, DIT_XL_2_512, DiTShape, write_dit
from loadtest.gpu import flux
from loadtest.gpu.bench import Bench
from loadtest.gpu.limits import DeviceLimits, limits_of
from loadtest.gpu.pictures import TINY
from loadtest.gpu.text import free
from loadtest.image_peers import NO_DIFFUSERS, Ask, EnginePeer, diffusers_version
from serve.options import ModelOptions

MODELS: tuple[tuple[str, DiTShape, bool, tuple[int, ...]], ...] = (
    ("DiT-XL/2 256x256", DIT_XL_2, True, (1, 2, 4, 8, 16, 32, 64)),
    ("DiT-XL/2 256x256", DIT_XL_2, False, (1, 4, 16)),
    ("DiT-XL/2 512x512", DIT_XL_2_512, True, (1, 2, 4, 8, 16)),
)
"""Name, shape, whether graphs may be used, rows of a step."""
_TINY_MODELS = (("DiT, tiny", TINY, True, (1, 3)),)
_WARM_STEPS = 8
"""Forwards of a shape before it counts: it is timed at its second use and captured at its third, if that pays."""
NUM_STEPS = (10, 30)
FLUX_ROWS = (1, 2)


def run(bench: Bench) -> None:
    if diffusers_version() is None:
        bench.note(NO_DIFFUSERS)
        return
    limits = limits_of(bench)
    models = _TINY_MODELS if bench.is_rehearsal else MODELS
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, shape, has_graphs, rows) in enumerate(models):
            if bench.has_time(name, 0 if bench.is_rehearsal else 12):
                with bench.attempt(name):
                    measure_dit(bench, limits, Path(scratch) / str(number), name, shape, has_graphs, rows)
                free()
        if bench.has_time("FLUX", 0 if bench.is_rehearsal else 15):
            flux.measure(bench, limits, Path(scratch) / "flux", FLUX_ROWS[: 1 if bench.is_rehearsal else None])


def measure_dit(
    bench: Bench,
    limits: DeviceLimits,
    folder: Path,
    name: str,
    shape: DiTShape,
    has_graphs: bool,
    rows_of_steps: tuple[int, ...],
) -> None:
    """One row for each number of rows, as far as there is time."""
    short, long = (1, 3) if bench.is_rehearsal else NUM_STEPS
    peer = EnginePeer(
        ModelOptions(
            model=str(write_dit(folder, shape)),
            kind="image",
            load_format="dummy",
            device=bench.device.type,  # type: ignore[arg-type]
            threads=1 if bench.is_rehearsal else None,
            enforce_eager=not has_graphs,
            max_num_images=max(rows_of_steps),
            max_num_batched_tokens=max(rows_of_steps) * shape.num_tokens,
        )
    )
    for rows in rows_of_steps:
        guess_s = 3 * (short + long) * rows * shape.row_flop / (0.2 * limits.matmul_flop_s)
        if not bench.has_time(f"{name}, {rows} rows", 0 if bench.is_rehearsal else 1 + guess_s):
            continue
        _seconds(peer, rows, _WARM_STEPS)
        short_s, long_s = (statistics.median(_seconds(peer, rows, steps) for _ in range(3)) for steps in (short, long))
        step_s = max(long_s - short_s, 1e-9) / (long - short)
        bench.row(
            "images",
            model=name,
            how="graphs where they pay" if has_graphs else "eager",
            dtype=peer.card.dtype,
            rows=rows,
            step_ms=1e3 * step_s,
            matmul_share=rows * shape.row_flop / step_s / limits.matmul_flop_s,
            row_steps_s=rows / step_s,
            steps=long,
            images_s=rows / long_s,
        )


def _seconds(peer: EnginePeer, rows: int, num_steps: int) -> float:
    """Until all pictures are in host memory."""
    solver = peer.limits.solvers[0]
    asks = [Ask(prompt=str(n), num_steps=num_steps, guidance_scale=1.0, solver=solver, seed=n) for n in range(rows)]
    began = time.perf_counter()
    peer.make(asks, rows)
    return time.perf_counter() - began
