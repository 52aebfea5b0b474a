"""Forwards of a diffusion transformer as CUDA graphs, where the host takes longer to launch one than the device to
compute it: small pictures and few rows. One launch then stands for a thousand.

A graph belongs to a shape (latents, tokens of text) and a number of rows. Latents, times and conditioning are copied
into buffers that never move; rows a step does not fill compute what lies there, and nobody reads them. Conditioning is
copied only where a row has another one than in the step before.

Whether a graph pays is found out, not assumed. A shape's first forward compiles and fills caches, the second is timed
on host and device, and when both times are there the next one is captured, or never will be. So what takes the device
long anyway (FLUX.1 at 1024 x 1024) runs with its exact rows and takes no memory, and nothing is captured to be used
once. A capture waits for the device and costs two forwards; a replayed step waits for nothing.

Each graph has memory of its own, which is measured and counted. Beyond the budget those leave that were used longest
ago. Where memory is short, or a forward cannot be captured, steps go on without.

Legend: R rows of a step, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.dit.base import Conditioning, DiT

log = logging.getLogger(__name__)

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the graphs: at most a third of a forward is computed for nobody. A larger batch runs without."""
BUDGET_SHARE = 0.05
"""Of the device's memory that all graphs together may take: 7 GB of an H200. A graph keeps about what its forward needs
beside the weights: some hundred MB for sixteen rows of DiT-XL/2."""
_LAUNCH_BOUND = 1.25
"""Times the host's time that the device may take for a graph to pay. Above, the host is ahead by itself."""
_TRIALS = 256
"""Shapes remembered that have no graph."""

Forward = Callable[[], Tensor]


class Captured(NamedTuple):
    replay: Callable[[], None]
    output: Tensor
    """What a replay fills."""
    num_bytes: int
    """Of device memory, kept for as long as the graph lives."""


class Trial(Protocol):
    """The timing of one forward."""

    def run(self, forward: Forward) -> Tensor: ...

    def is_launch_bound(self) -> bool | None:
        """None while the device has not finished."""
        ...


class _Shape(NamedTuple):
    num_rows: int
    latent: tuple[int, ...]
    conditioning: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(slots=True)
class _Prospect:
    """A shape without a graph."""

    num_uses: int = 0
    trial: Trial | None = None
    is_unfit: bool = False


class ForwardGraphs:
    """Stands before a model's `predict`. One thread."""

    def __init__(
        self,
        model: DiT,
        device: torch.device,
        *,
        budget: int,
        capture: Callable[[Forward], Captured] | None = None,
        trial: Callable[[], Trial] | None = None,
    ):
        """`budget`: bytes that all graphs together may take."""
        self._model = model
        self._device = device
        self._budget = budget
        self._capture = capture or _OwnMemory()
        self._trial = trial or DeviceTrial
        self._graphs: OrderedDict[_Shape, _Graph] = OrderedDict()
        self._prospects: OrderedDict[_Shape, _Prospect] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of device memory, held by all graphs."""
        return sum(graph.num_bytes for graph in self._graphs.values())

    def predict(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """`DiT.predict`. What it gives is valid until the next call."""
        shape = _shape_of(latents_RCHW, conditioning)
        if shape is None:
            return self._model.predict(latents_RCHW, times_R, conditioning)
        graph = self._graphs.get(shape) or self._consider(shape, conditioning[0])
        if graph is None:
            return self._without(
                self._prospects[shape], lambda: self._model.predict(latents_RCHW, times_R, conditioning)
            )
        self._graphs.move_to_end(shape)
        return graph.replay(latents_RCHW, times_R, conditioning)

    def _consider(self, shape: _Shape, like: Conditioning) -> _Graph | None:
        """A graph for a shape that is worth one."""
        prospect = self._prospects.setdefault(shape, _Prospect())
        self._prospects.move_to_end(shape)
        if len(self._prospects) > _TRIALS:
            self._prospects.popitem(last=False)
        if prospect.is_unfit or prospect.trial is None or (pays := prospect.trial.is_launch_bound()) is None:
            return None
        graph = self._make(shape, like) if pays else None
        prospect.is_unfit = graph is None
        return graph

    def _without(self, prospect: _Prospect, forward: Forward) -> Tensor:
        trial = self._trial() if prospect.num_uses == 1 else None
        output = forward() if trial is None else trial.run(forward)
        prospect.num_uses += 1
        prospect.trial = trial or prospect.trial
        return output

    def _make(self, shape: _Shape, like: Conditioning) -> _Graph | None:
        """None where there is no memory for it, or the forward does what a capture cannot hold."""
        try:
            graph = _Graph(self._model, shape, like, self._device, self._capture)
        except RuntimeError as error:
            cause = str(error).partition("\n")[0]
            log.warning("forward graph failed rows=%d latent=%s error=%s", shape.num_rows, shape.latent, cause)
            return None
        if graph.num_bytes > self._budget:
            return None
        self._graphs[shape] = graph
        del self._prospects[shape]
        while self.num_bytes > self._budget:
            self._graphs.popitem(last=False)
        log.info(
            "forward graph rows=%d latent=%s bytes=%d graphs=%d all_bytes=%d",
            *(shape.num_rows, shape.latent, graph.num_bytes, len(self._graphs), self.num_bytes),
        )
        return graph


class _Graph:
    """One shape: buffers to fill, a function to call, a result to read."""

    def __init__(
        self,
        model: DiT,
        shape: _Shape,
        like: Conditioning,
        device: torch.device,
        capture: Callable[[Forward], Captured],
    ):
        num_rows = shape.num_rows
        self._latents_RCHW = torch.zeros(num_rows, *shape.latent, device=device)
        self._times_R = torch.zeros(num_rows, device=device)
        buffers = {
            name: torch.zeros(num_rows, *size[1:], dtype=dtype, device=device)
            for name, size, dtype in shape.conditioning
        }
        self._rows = [
            Conditioning({name: buffer[i : i + 1] for name, buffer in buffers.items()}, like.num_tokens)
            for i in range(num_rows)
        ]
        self._held: list[Conditioning | None] = [None] * num_rows
        """Whose conditioning each row of the buffers holds."""
        captured = capture(lambda: model.predict(self._latents_RCHW, self._times_R, self._rows))
        self._replay, self._output_RCHW = captured.replay, captured.output
        inputs = (self._latents_RCHW, self._times_R, *buffers.values())
        self.num_bytes = captured.num_bytes + sum(buffer.nbytes for buffer in inputs)

    def replay(self, latents_RCHW: Tensor, times_R: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        num_rows = len(conditioning)
        self._latents_RCHW[:num_rows].copy_(latents_RCHW)
        self._times_R[:num_rows].copy_(times_R)
        for i, row in enumerate(conditioning):
            if self._held[i] is not row:
                for name, tensor in row.tensors.items():
                    self._rows[i].tensors[name].copy_(tensor)
                self._held[i] = row
        self._replay()
        return self._output_RCHW[:num_rows]


class DeviceTrial:
    """By the host's clock and two events on the device, which nobody waits for."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._host_s = 0.0

    def run(self, forward: Forward) -> Tensor:
        began = time.perf_counter()
        self._begin.record()
        output = forward()
        self._end.record()
        self._host_s = time.perf_counter() - began
        return output

    def is_launch_bound(self) -> bool | None:
        if not self._end.query():
            return None
        return self._begin.elapsed_time(self._end) / 1e3 <= _LAUNCH_BOUND * self._host_s


def budget_of(device: torch.device) -> int:
    """Bytes that graphs on this CUDA device may take."""
    return int(BUDGET_SHARE * torch.cuda.get_device_properties(device).total_memory)


def _shape_of(latents_RCHW: Tensor, conditioning: Sequence[Conditioning]) -> _Shape | None:
    """What a step's graph must be for; None for more rows than any has."""
    num_rows = len(conditioning)
    if num_rows > SIZES[-1]:
        return None
    named = conditioning[0].tensors
    return _Shape(
        SIZES[bisect_left(SIZES, num_rows)],
        tuple(latents_RCHW.shape[1:]),
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(named.items())),
    )


class _OwnMemory:
    """Captures on CUDA, each graph into memory of its own. Waits for the device."""

    def __init__(self) -> None:
        # One for all: libraries keep a workspace for every stream they have seen, and a capture cannot make it.
        self._stream = torch.cuda.Stream()

    def __call__(self, forward: Forward) -> Captured:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            forward()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            output = forward()
        return Captured(graph.replay, output, torch.cuda.memory_reserved() - before)
