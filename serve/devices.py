"""Which of this machine's CUDA devices a process sees, told by the environment before CUDA starts. No torch.

A process computes on one device and sees that one first, as `cuda:0`: torch and Triton then never meet another by
mistake, whatever thread they are called in. Ray gives its actors their devices the same way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from serve.options import ModelOptions

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """As CUDA names them: those this process may use, else all whose driver's files are there."""
    shown = os.environ.get(VISIBLE)
    if shown is not None:
        return [name.strip() for name in shown.split(",") if name.strip()]
    files = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(filter(str.isdecimal, files), key=int)


def assign_devices(models: Sequence[ModelOptions], devices: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """By model and replica: as many devices as it has ranks, each for one alone.

    Nothing for any of them (all see all, and begin with the first) when there are fewer devices than ranks.
    """
    wanted = [[0 if model.device == "cpu" else model.num_ranks] * model.num_replicas for model in models]
    if sum(map(sum, wanted)) > len(devices):
        return [[()] * len(replicas) for replicas in wanted]
    left = iter(devices)
    return [[tuple(next(left) for _ in range(num)) for num in replicas] for replicas in wanted]


def device_name(device: str) -> str:
    """This process's `device` (`cpu`, `cuda:i`) by the number it has on the machine."""
    kind, _, index = device.partition(":")
    devices = visible_devices()
    return f"{kind}:{devices[int(index)]}" if index and int(index) < len(devices) else device
