"""The error of each kernel against float64 on fresh random inputs, and how much of the card's ceiling it reaches.

Before a kernel runs, the memory that its output will get is filled with NaN: what it leaves unwritten shows. The same
operation in plain torch, which is what a device without the kernel computes, is timed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from loadtest.gpu import attention
from loadtest.gpu.bench import Bench, WrongResult
from loadtest.gpu.limits import DeviceLimits, limits_of
from loadtest.gpu.timing import Stopwatch
from models.kernels.available import has_kernels

BOUNDS = {"bfloat16": 1e-2, "float32": 1e-5}
"""A relative error in norm beyond which the kernel computes something else: one rounding of a bfloat16 is 2^-9."""
WORST_ATTENTION = 3e-2
"""Weights and sums are rounded several times on the way, and keys of one byte are compared as what they stand for."""
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation on tensors. `reference` takes them in any precision."""

    name: str
    shape: str
    make: Callable[[], Tensors]
    """Fresh random inputs."""
    compute: Callable[..., torch.Tensor | Tensors]
    reference: Callable[..., torch.Tensor | Tensors]
    num_bytes: float
    """Each input read once, each output written once."""


def run(bench: Bench) -> None:
    """Raises WrongResult when an error is beyond its bound."""
    limits = limits_of(bench)
    if not has_kernels(bench.device):
        bench.note("kernels: triton is not installed, so there is none")
        return
    for kernel in fused(bench):
        if bench.has_time(f"{kernel.name} {kernel.shape}", 0 if bench.is_rehearsal else 2):
            about = {"kernel": kernel.name, "shape": kernel.shape}
            try:
                found = _measure(bench, limits, kernel)
            except Exception as error:  # of this kernel; what has broken the device breaks the others too, and shows
                bench.row("kernel", **about, error=None, failure=f"{type(error).__name__}: {error}"[:300])
            else:
                bench.row("kernel", **about, **found)
    attention.measure(bench, limits)
    bounds = {"kernel": BOUNDS["float32" if bench.is_rehearsal else "bfloat16"], "attention": WORST_ATTENTION}
    wrong = [
        f"{row.get('kernel', row.get('backend'))} {row['shape']}"
        for kind, bound in bounds.items()
        for row in bench.outcome.of_kind(kind)
        if row["error"] is None or not row["error"] < bound
    ]
    if wrong:
        raise WrongResult(f"failed, or further from float64 than rounding explains: {', '.join(wrong)}")


def _measure(bench: Bench, limits: DeviceLimits, kernel: Kernel) -> dict[str, float]:
    """Columns of a row."""
    inputs = kernel.make()
    exact = _all(kernel.reference(*(tensor.double() for tensor in inputs)))
    _poison(exact, inputs[0])
    ours = _all(kernel.compute(*(tensor.clone() for tensor in inputs)))
    error = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))
    stopwatch = Stopwatch(bench.device)
    timing, plain = (stopwatch(lambda f=f: f(*inputs)) for f in (kernel.compute, kernel.reference))
    return {
        "error": error,
        "microseconds": 1e6 * timing.median_s,
        "spread": timing.spread,
        "ceiling": limits.floor_s(kernel.num_bytes, 0.0) / timing.median_s,
        "times_faster": plain.median_s / timing.median_s,
    }


def fused(bench: Bench) -> Iterator[Kernel]:
    """Of decoders in the 8 B shape for a decode and a full step, of DiT-XL/2 and FLUX for saturated steps."""
    from models.kernels.modulate import (
        gate_add,
        gate_add_modulate,
        gate_add_reference,
        modulate,
        modulate_reference,
    )
    from models.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_reference
    from models.kernels.silu_mul import silu_mul, silu_mul_reference

    dtype = torch.float32 if bench.is_rehearsal else torch.bfloat16
    size = dtype.itemsize
    eps = 1e-5

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=bench.device, dtype=dtype)

    def added(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Tensors:
        return add_rms_norm_(residual, x, weight, eps), residual

    def added_reference(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Tensors:
        return rms_norm_reference(residual + x, weight, eps), residual + x

    width, inner = (64, 96) if bench.is_rehearsal else (4096, 14_336)
    for rows in (3,) if bench.is_rehearsal else (1, 64, 8192):
        shape = f"{rows} x {width}"
        wide = rows * width * size
        yield Kernel(
            "rms_norm",
            shape,
            lambda rows=rows: (random(rows, width), random(width)),
            lambda x, w: rms_norm(x, w, eps),
            lambda x, w: rms_norm_reference(x, w, eps),
            2 * wide,
        )
        yield Kernel(
            "add_rms_norm_",
            shape,
            lambda rows=rows: (random(rows, width), random(rows, width), random(width)),
            added,
            added_reference,
            4 * wide,
        )
        yield Kernel(
            "silu_mul",
            f"{rows} x 2 x {inner}",
            lambda rows=rows: (random(rows, 2 * inner),),
            silu_mul,
            silu_mul_reference,
            3 * rows * inner * size,
        )

    def both(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> Tensors:
        return gate_add_modulate(x, gate, y, shift, scale, eps)

    def both_reference(
        x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
    ) -> Tensors:
        total = gate_add_reference(x, gate, y)
        return total, modulate_reference(total, shift, scale, eps)

    for rows, tokens, wide_d in ((2, 5, 48),) if bench.is_rehearsal else ((32, 256, 1152), (1, 4608, 3072)):
        shape, whole = f"{rows} x {tokens} x {wide_d}", rows * tokens * wide_d * size

        def streams(count: int, rows: int = rows, tokens: int = tokens, d: int = wide_d) -> Tensors:
            return tuple(random(rows, tokens, d) for _ in range(count))

        def vectors(count: int, rows: int = rows, d: int = wide_d) -> Tensors:
            return tuple(random(rows, d) for _ in range(count))

        yield Kernel(
            "modulate",
            shape,
            lambda s=streams, v=vectors: (*s(1), *v(2)),
            lambda x, shift, scale: modulate(x, shift, scale, eps),
            lambda x, shift, scale: modulate_reference(x, shift, scale, eps),
            2 * whole,
        )
        yield Kernel(
            "gate_add",
            shape,
            lambda s=streams, v=vectors: (*s(1), *v(1), *s(1)),
            gate_add,
            gate_add_reference,
            3 * whole,
        )
        yield Kernel(
            "gate_add_modulate",
            shape,
            lambda s=streams, v=vectors: (*s(1), *v(1), *s(1), *v(2)),
            both,
            both_reference,
            4 * whole,
        )


def _poison(outputs: Tensors, like: torch.Tensor) -> None:
    """The allocator gives freed memory to who asks next for as much."""
    held = [torch.full(output.shape, float("nan"), dtype=like.dtype, device=like.device) for output in outputs]
    held.clear()


def _all(result: torch.Tensor | Tensors) -> Tensors:
    return result if isinstance(result, tuple) else (result,)
