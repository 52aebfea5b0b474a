"""The error of each kernel against float64 on fresh random inputs, and how much of the card's ceiling it reaches.

Before a kernel runs, the memory that its output will get is filled with NaN: what it leaves unwritten shows. The same
operation in plain torch, which is what a device without the kernel computes, is timed beside it.
"""

from __future__ import annotations

import itertools

import torch

from loadtest.gpu import attention, sampling
from loadtest.gpu.bench import Bench, WrongResult
from loadtest.gpu.fused import fused
from loadtest.gpu.kernel import Kernel, Tensors
from loadtest.gpu.limits import DeviceLimits, limits_of
from loadtest.gpu.products import products
from loadtest.gpu.timing import Stopwatch
from models.kernels.available import has_kernels

BOUNDS = {"bfloat16": 1e-2, "float32": 1e-5}
"""A relative error in norm beyond which the kernel computes something else: one rounding of a bfloat16 is 2^-9."""


def run(bench: Bench) -> None:
    """Raises WrongResult when an error is beyond its bound."""
    limits = limits_of(bench)
    if not has_kernels(bench.device):
        bench.note("kernels: triton is not installed, so there is none")
        return
    attention.measure_rotation(bench, limits)
    attention.measure(bench, limits)
    sampling.measure(bench, limits)
    for kernel in itertools.chain(fused(bench), products(bench)):
        if bench.has_time(f"{kernel.name} {kernel.shape}", 0 if bench.is_rehearsal else 2):
            about = {"kernel": kernel.name, "shape": kernel.shape}
            try:
                found = _measure(bench, limits, kernel)
            except Exception as error:  # of this kernel; what has broken the device breaks the others too, and shows
                bench.row("kernel", **about, error=None, failure=f"{type(error).__name__}: {error}"[:300])
            else:
                bench.row("kernel", **about, **found)
    wrong = [
        " ".join(str(row[name]) for name in ("kernel", "backend", "shape", "kv", "sampling", "rows") if name in row)
        for row in bench.outcome.rows
        if row["kind"] in ("kernel", "attention", "sampler")
        and (row["error"] is None or not row["error"] < row.get("bound", attention.BOUND))
    ]
    if wrong:
        raise WrongResult(f"failed, or further from what is exact than rounding explains: {'; '.join(wrong)}")


def _measure(bench: Bench, limits: DeviceLimits, kernel: Kernel) -> dict[str, float]:
    """Columns of a row."""
    inputs = kernel.make()
    exact = _all(kernel.reference(*(tensor.double() for tensor in inputs)))
    _poison(exact, inputs[0])
    ours = _all(kernel.compute(*(tensor.clone() for tensor in inputs)))
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
    stopwatch = Stopwatch(bench.device)
    functions = (kernel.compute, kernel.plain or kernel.reference)
    timing, plain = (stopwatch(lambda function=function: function(*inputs)) for function in functions)
    return {
        "error": error,
        "bound": kernel.bound or BOUNDS["float32" if inputs[0].dtype == torch.float32 else "bfloat16"],
        "microseconds": 1e6 * timing.median_s,
        "spread": timing.spread,
        "ceiling": limits.floor_s(kernel.num_bytes, kernel.flop) / timing.median_s,
        "times_faster": plain.median_s / timing.median_s,
    }


def _poison(outputs: Tensors, like: torch.Tensor) -> None:
    """The allocator gives freed memory to who asks next for as much."""
    held = [torch.full(output.shape, float("nan"), dtype=like.dtype, device=like.device) for output in outputs]
    held.clear()


def _all(result: torch.Tensor | Tensors) -> Tensors:
    return result if isinstance(result, tuple) else (result,)
