"""The fused kernels of `models/kernels`, in the sizes of Llama-3.1-8B, DiT-XL/2 and FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loadtest.gpu.bench import Bench
from loadtest.gpu.kernel import Kernel, Tensors


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
