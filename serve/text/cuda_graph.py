"""Decode steps as CUDA graphs: one launch instead of some hundreds, which at small batches is most of a step's time.

A graph is a forward over a fixed number of rows with one new token each, in buffers that never move. A step copies its
ids, positions and plan into the buffers of the next larger graph and replays it; rows it does not fill compute the
padding token in the runner's own block. A few sizes are captured before the replica is ready, the others one by one
while the engine is idle, or when a batch wants them sooner (each costs two forwards): without a compiler there is
nothing to wait for.

The plan of such a step is made by the attention backend as always and copied into the captured one, tensor by tensor.
So a backend is capturable when its plans for decodes differ in the content of their tensors and in the width of block
tables, and in nothing else; it says so by `is_capturable`.

Legend: T rows of a step, one token each; D hidden size.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.attention.base import AttentionBackend, TokenLayout
from models.text.base import CausalLM, StepContext

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows of the graphs; a larger batch is computed without one (its kernels are long enough to hide their launches)."""

Forward = Callable[[], torch.Tensor]
Capture = Callable[[Forward], tuple[Callable[[], None], torch.Tensor]]
"""From a forward over fixed buffers to a function that computes it again and the tensor it then fills."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """One size: buffers to fill, a function to call, a result to read."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    plan: Any
    replay: Callable[[], None]
    hidden_TD: torch.Tensor


class DecodeGraphs:
    """The graphs of one runner. `own_block` holds what padding rows write, `max_blocks` bounds a block table."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        kv_cache: list[Any],
        *,
        own_block: int,
        max_blocks: int,
        block_size: int,
        max_rows: int,
        device: torch.device,
        capture: Capture | None = None,
    ):
        self._model = model
        self._attention = attention
        self._kv_cache = kv_cache
        self._own_table = [own_block]
        self._max_blocks = max_blocks
        self._block_size = block_size
        self._device = device
        self._capture = capture or _Pool()
        most = SIZES[min(bisect_left(SIZES, max_rows), len(SIZES) - 1)]
        self._sizes = [size for size in SIZES if size <= most]
        self._graphs: dict[int, _Graph] = {}

    def warm_up(self) -> None:
        """Capture the largest size first, whose memory the others reuse, and those a lone user needs."""
        for size in sorted({self._sizes[-1], 1, min(8, self._sizes[-1])}, reverse=True):
            self._graphs[size] = self._capture_size(size)

    def capture_next(self) -> bool:
        """Capture the smallest size that is missing, if any; False when none is left."""
        missing = [size for size in self._sizes if size not in self._graphs]
        if missing:
            self._graphs[missing[0]] = self._capture_size(missing[0])
        return len(missing) > 1

    def covers(self, num_rows: int) -> bool:
        return num_rows <= self._sizes[-1]

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """hidden_TD of a step in which every sequence has one new token. Valid until the next call."""
        num_rows = len(layout.num_new)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        if size not in self._graphs:
            self._graphs[size] = self._capture_size(size)
        graph = self._graphs[size]
        graph.ids_T[:num_rows].copy_(ids_T)
        graph.positions_T[:num_rows].copy_(positions_T)
        padding = size - num_rows
        _copy_corner(graph.plan, self._attention.plan(self._padded(layout, padding)))
        graph.replay()
        return graph.hidden_TD[:num_rows]

    def _capture_size(self, size: int) -> _Graph:
        ids_T = torch.zeros(size, dtype=torch.int64, device=self._device)
        positions_T = torch.zeros_like(ids_T)
        # The widest plan sets the buffers; then the cheapest content, for the forward before the capture.
        longest = self._max_blocks * self._block_size - 1
        plan = self._attention.plan(
            TokenLayout([1] * size, [longest] * size, [self._own_table * self._max_blocks] * size)
        )
        _copy_corner(plan, self._attention.plan(self._padded(TokenLayout([], [], []), size)))
        context = StepContext(self._attention, plan, self._kv_cache)
        replay, hidden_TD = self._capture(lambda: self._model.forward(ids_T, positions_T, context))
        return _Graph(ids_T, positions_T, plan, replay, hidden_TD)

    def _padded(self, layout: TokenLayout, num_rows: int) -> TokenLayout:
        return TokenLayout(
            [*layout.num_new, *[1] * num_rows],
            [*layout.num_computed, *[0] * num_rows],
            [*layout.block_tables, *[self._own_table] * num_rows],
        )


class _Pool:
    """Captures into one memory pool: graphs never run at the same time, so they may share it."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        forward()  # compiles kernels and fills the allocator's caches, neither of which a capture can do
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_TD = forward()
        self._pool = self._pool or graph.pool()
        return graph.replay, hidden_TD


def _copy_corner(old: Any, new: Any) -> None:
    """Copy the tensors of plan `new` over the leading corner of those of plan `old`; all else must be equal."""
    if isinstance(old, torch.Tensor):
        old[tuple(slice(size) for size in new.shape)].copy_(new)
    elif dataclasses.is_dataclass(old):
        for field in dataclasses.fields(old):
            _copy_corner(getattr(old, field.name), getattr(new, field.name))
    elif isinstance(old, Sequence) and not isinstance(old, str):
        assert len(old) == len(new), "the plans of two decodes have different structures"
        for old_part, new_part in zip(old, new):
            _copy_corner(old_part, new_part)
    else:
        assert old == new, f"the plans of two decodes differ in a plain value: {old!r} and {new!r}"
