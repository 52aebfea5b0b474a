"""Copies between host and device that do not wait: through pinned memory on CUDA, nothing at all on CPU.

A plain `torch.tensor(values, device="cuda")` waits for everything queued before it, and the host could no longer
prepare a step while the last one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of plain numbers on `device`, ready for what is queued after it."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a host tensor, which may be overwritten at once."""
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, complete once the stream is synchronised; the tensor itself when it is there already."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
