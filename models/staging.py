"""What a step reads from the host: laid out in one pinned buffer by all who plan it, sent by one copy.

The runner and the plans of attention and sampling `put` their integers and get views of a buffer on the device at once;
their content arrives with `send`, before whatever is queued after it. The buffer on the device is one allocation that
never moves: the copies run in the order of the kernels, so a step's inputs land when the step before has read its own.
Therefore a step that puts the same sizes in the same order finds them at the same addresses, where a CUDA graph reads
them, and nothing is copied again. On the host a ring of buffers, each guarded by a mark behind its copy, lets the next
steps be written while copies are still under way.

vLLM and TensorRT-LLM keep a buffer for every input and copy each; that it takes one copy only is older (a "command
buffer"). On CPU a put is a tensor of its own and there is nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.device_queue import DeviceQueue, Mark, queue_of

ALIGN = 128
"""Bytes; a cache line of the device. Triton compiles kernels anew for pointers that are not multiples of 16."""
CAPACITY = 4 << 20
"""Bytes of a step, unless told. Prefill of 8192 tokens takes about 200 KB, 256 decodes over 100 blocks each 110 KB."""
_NUM_BUFFERS = 3
"""One is written while the device computes a step and another waits for it."""
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.uint8: np.dtype(np.uint8),
}


@dataclass(slots=True)
class _HostBuffer:
    pinned: torch.Tensor
    typed: dict[torch.dtype, np.ndarray]
    """All of it, as each type."""
    sent: Mark | None = None
    """Behind the last copy from here."""


class Staging:
    """One per runner. Counts what it copies."""

    def __init__(
        self,
        device: torch.device,
        capacity: int = CAPACITY,
        queue: DeviceQueue | None = None,
        num_buffers: int | None = None,
    ):
        """`capacity`: bytes of a step, alignment included. What does not fit takes copies of its own.

        `queue`: None for the device's own. `num_buffers`: how many copies may be under way before a put waits for one;
        None: as many as steps of one copy need.
        """
        self.num_copies = 0
        self.num_spilled = 0
        """Of the copies: those for which there was no room."""
        self.num_bytes = 0
        self._queue = queue or queue_of(device)
        self._device = device
        self._capacity = capacity = -(-capacity // ALIGN) * ALIGN
        self._end = 0
        self._placed: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self._queue is None:
            return
        self._target = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._targets = {dtype: self._target.view(dtype) for dtype in _NUMPY}
        self._ring = [self._buffer(self._queue.pinned(capacity)) for _ in range(num_buffers or _NUM_BUFFERS)]

    def put(self, values: Sequence[int] | Sequence[float] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of these values on the device, of the array's shape; valid from `send` until the next one.

        An array is given away: on CPU the tensor is made of its memory.
        """
        kind = _NUMPY[dtype]
        if self._queue is None:
            return torch.from_numpy(np.ascontiguousarray(values, kind))
        size = values.size if isinstance(values, np.ndarray) else len(values)
        at = -(-self._end // ALIGN) * ALIGN
        if at + size * kind.itemsize > self._capacity:
            return self._spill(np.asarray(values, kind), dtype)
        buffer = self._ring[0]
        if not self._end and buffer.sent is not None:
            buffer.sent.synchronize()
        first = at // kind.itemsize
        self._end = at + size * kind.itemsize
        target = self._targets[dtype][first : first + size]
        if isinstance(values, np.ndarray) and values.ndim != 1:
            buffer.typed[dtype][first : first + size] = values.reshape(-1)
            return target.view(values.shape)
        buffer.typed[dtype][first : first + size] = values
        return target

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for values that only the device knows: `send` copies them there, for who reads at this address."""
        if self._queue is None:
            return tensor
        target = self.put(np.empty(tensor.shape, _NUMPY[tensor.dtype]), tensor.dtype)
        self._placed.append((target, tensor))
        return target

    def send(self) -> None:
        """Queue the copy of all that was put since the last one."""
        if not self._end:
            return
        assert self._queue is not None
        buffer = self._ring.pop(0)
        self._queue.upload(buffer.pinned[: self._end], self._target[: self._end])
        buffer.sent = self._queue.mark()
        self._ring.append(buffer)
        self.num_copies += 1
        self.num_bytes += self._end
        self._end = 0
        for target, tensor in self._placed:
            target.copy_(tensor)
        self._placed.clear()

    def _spill(self, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        assert self._queue is not None
        source = self._queue.pinned(values.nbytes).view(dtype).view(values.shape)
        source.numpy()[...] = values
        target = torch.empty(values.shape, dtype=dtype, device=self._device)
        self._queue.upload(source, target)
        self.num_copies += 1
        self.num_spilled += 1
        self.num_bytes += values.nbytes
        return target

    def _buffer(self, pinned: torch.Tensor) -> _HostBuffer:
        whole = pinned.numpy()
        return _HostBuffer(pinned, {dtype: whole.view(kind) for dtype, kind in _NUMPY.items()})
