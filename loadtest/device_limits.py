"""What a CUDA device can do at most, measured: the ceilings that throughput is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    name: str
    read_bytes_s: float
    """Streaming reads from device memory."""
    matmul_flop_s: float
    """bfloat16 matrix product of 8192 x 8192 x 8192."""


def measure_limits(device: torch.device) -> DeviceLimits:
    limits = DeviceLimits(torch.cuda.get_device_name(device), _read_bytes_s(device), _matmul_flop_s(device))
    torch.cuda.empty_cache()
    return limits


def _read_bytes_s(device: torch.device) -> float:
    values = torch.ones(1 << 30, dtype=torch.int32, device=device)  # 4 GiB: far beyond any cache
    return values.nbytes / _median_s(lambda: values.sum(dtype=torch.int32))


def _matmul_flop_s(device: torch.device) -> float:
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _median_s(lambda: a @ b)


def _median_s(compute: Callable[[], object], *, repetitions: int = 10) -> float:
    for _ in range(3):
        compute()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        compute()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
