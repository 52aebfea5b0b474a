"""Copies between host and device that wait for nothing, in the order in which the device computes.

A plain copy from ordinary memory makes the host wait for all that is queued, and it could no longer prepare a step
while the last one is computed. So both directions go through pinned memory, and only a mark says when one is done.
Behind a protocol, so that tests have a device that is late on purpose where there is none.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Mark(Protocol):
    """A place in the queue."""

    def synchronize(self) -> None:
        """Wait until the device has come so far."""
        ...


class DeviceQueue(Protocol):
    """What one device is to do, in order, while the host goes on."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory (uint8) for the copies below."""
        ...

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy `source`, which is pinned and must stay as it is until a mark behind this has happened."""
        ...

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, complete when a mark behind this has happened."""
        ...

    def mark(self) -> Mark: ...


class CudaQueue:
    """The current stream of a CUDA device. One stream for copies and kernels: a step's inputs are some 100 KB, 5 µs on
    PCIe 5, and on a stream of their own they would need a second buffer on the device, which graphs do not have."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event()
        event.record()
        return event


def queue_of(device: torch.device) -> DeviceQueue | None:
    """None on CPU: what is computed there is computed when it is asked for."""
    return CudaQueue() if device.type == "cuda" else None
