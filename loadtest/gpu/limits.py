"""What a device can do at most, measured: the ceilings that everything else is compared with."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from loadtest.gpu.bench import Bench, path_of
from loadtest.gpu.machine import datasheet_flop_s
from loadtest.gpu.timing import Stopwatch

_BYTES = 4 << 30
"""Far beyond any cache."""
_SIDE = 8192


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    name: str
    bytes_s: float
    """Of device memory: the larger of a copy, which counts what is read and what is written, and of reading alone."""
    matmul_flop_s: float
    """bfloat16 matrix product of 8192 x 8192 x 8192, random numbers."""

    @property
    def peak_flop_s(self) -> float:
        """The datasheet's, or where that is not known the measured rate."""
        return datasheet_flop_s(self.name) or self.matmul_flop_s

    def floor_s(self, num_bytes: float, flop: float) -> float:
        """No version of what moves so much and computes so much is faster."""
        return max(num_bytes / self.bytes_s, flop / self.matmul_flop_s)


def run(bench: Bench) -> None:
    """The part: three rows."""
    num_bytes, side = (1 << 22, 256) if bench.is_rehearsal else (_BYTES, _SIDE)
    stopwatch = Stopwatch(bench.device, seconds=0.5, empties_cache=False)
    source = torch.randint(-(1 << 30), 1 << 30, (num_bytes // 4,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    copy = stopwatch(lambda: target.copy_(source))
    bench.row("limits", what="copy, read and written", gb_s=2 * num_bytes / copy.median_s / 1e9, spread=copy.spread)
    read = stopwatch(lambda: source.sum(dtype=torch.int32))
    bench.row("limits", what="read", gb_s=num_bytes / read.median_s / 1e9, spread=read.spread)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = stopwatch(lambda: a @ b)
    rate = 2 * side**3 / product.median_s
    bench.row("limits", what=f"bf16 matrix product, {side} cubed", tflop_s=rate / 1e12, spread=product.spread)


def limits_of(bench: Bench) -> DeviceLimits:
    """As the part `limits` found them in the same folder; else found now, as rows of this part."""
    path = path_of(bench.folder, "limits")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    if len(rows) < 3:
        run(bench)
        rows = bench.outcome.of_kind("limits")
    return DeviceLimits(
        bench.outcome.about["device"],
        1e9 * max(row["gb_s"] for row in rows if "gb_s" in row),
        1e12 * max(row["tflop_s"] for row in rows if "tflop_s" in row),
    )
