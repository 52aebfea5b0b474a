"""A device that is late on purpose, on CPU: what reads or overwrites too early is found, as it is not on a fast GPU.

Kernels compute at once, for order on the device is the stream's affair. What the host sees is late: a download is
poison, and an upload's source is in use, until the host has waited for a mark behind it. So a host that reads a result
before its event, or writes into a pinned buffer whose copy is under way, fails here every time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

POISON = 0xA5
"""Every byte. As int64, int32 or float32 no value that a step would have."""


class Overlap(AssertionError):
    """The host touched what the device was still using."""


@dataclass(eq=False)
class _Upload:
    source: torch.Tensor
    sent: torch.Tensor

    def finish(self) -> None:
        if not torch.equal(_bytes(self.source), _bytes(self.sent)):
            raise Overlap("a pinned buffer was written while its copy to the device was under way")


@dataclass(eq=False)
class _Download:
    target: torch.Tensor
    result: torch.Tensor

    def finish(self) -> None:
        if not (_bytes(self.target) == POISON).all():
            raise Overlap("a download was written to before it was complete")
        self.target.copy_(self.result)


@dataclass(eq=False)
class AsyncMark:
    """A `Mark`. `synchronize` lets the device come so far, and no further."""

    queue: AsyncQueue

    def synchronize(self) -> None:
        if self in self.queue._waiting:
            self.queue.num_waits += 1
            self.queue.advance(self)


@dataclass(eq=False)
class AsyncQueue:
    """A `DeviceQueue`."""

    num_uploads: int = 0
    num_downloads: int = 0
    num_waits: int = 0
    """Marks waited for that had not happened yet."""
    _waiting: deque[_Upload | _Download | AsyncMark] = field(default_factory=deque)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.num_uploads += 1
        target.copy_(source)
        self._waiting.append(_Upload(source, source.clone()))

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_downloads += 1
        target = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        _bytes(target).fill_(POISON)
        self._waiting.append(_Download(target, tensor.clone()))
        return target

    def mark(self) -> AsyncMark:
        mark = AsyncMark(self)
        self._waiting.append(mark)
        return mark

    @torch.inference_mode()
    def advance(self, until: AsyncMark | None = None) -> None:
        """Finish what is queued, up to a mark or all of it."""
        while self._waiting:
            done = self._waiting.popleft()
            if done is until:
                return
            if not isinstance(done, AsyncMark):
                done.finish()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
