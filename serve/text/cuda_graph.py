"""Decode steps as CUDA graphs: one launch instead of some hundreds, which at small batches is most of a step's time.

A graph is a forward over a fixed number of rows with one new token each. It reads its inputs where the step's one copy
from the host puts them: the staging buffer never moves, and a step of as many rows puts the same sizes in the same
order. Rows that a step does not fill compute the padding token in the runner's own block. A few sizes are captured
before the replica is ready, the others one by one while the engine is idle, or when a batch wants them sooner (each
costs two forwards): without a compiler there is nothing to wait for.

The plan of such a step is made by the attention backend as always. So a backend is capturable when its plans for
decodes differ in the content of their tensors and in the length of block tables, which it puts last, and in nothing
else; it says so by `is_capturable`. A step whose inputs lie elsewhere all the same (block tables beyond the buffer) is
computed without a graph.

Legend: T rows of a step, one token each; D hidden size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from models.attention.base import AttentionBackend, TokenLayout
from models.staging import Staging
from models.text.base import CausalLM, StepContext
from serve.text.step_inputs import StepInputs

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows of the graphs; a larger batch is computed without one (its kernels are long enough to hide their launches)."""

Forward = Callable[[], torch.Tensor]
Capture = Callable[[Forward], tuple[Callable[[], None], torch.Tensor]]
"""From a forward over fixed buffers to a function that computes it again and the tensor it then fills."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """One size: where it reads, a function to call, a result to read."""

    inputs: StepInputs
    replay: Callable[[], None]
    hidden_TD: torch.Tensor


class DecodeGraphs:
    """The graphs of one runner. `own_block` holds what padding rows write."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        kv_cache: list[Any],
        *,
        staging: Staging,
        own_block: int,
        max_rows: int,
        capture: Capture | None = None,
    ):
        self._model = model
        self._attention = attention
        self._kv_cache = kv_cache
        self._staging = staging
        self._own_table = array("i", [own_block])
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

    def covers(self, layout: TokenLayout) -> bool:
        return len(layout.num_new) <= self._sizes[-1] and all(num == 1 for num in layout.num_new)

    def put(self, token_ids: list[int], positions: list[int], layout: TokenLayout) -> StepInputs:
        """The first puts of a step in which every sequence has one new token: as many rows as the next larger graph."""
        size = self._sizes[bisect_left(self._sizes, len(token_ids))]
        if size not in self._graphs:
            self._graphs[size] = self._capture_size(size)
        return self._put(size, token_ids, positions, layout)

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """hidden_TD of all rows, padding included. Valid until the next call."""
        graph = self._graphs[len(inputs.token_ids_T)]
        if not inputs.lie_where(graph.inputs):
            return self._compute(inputs)
        graph.replay()
        return graph.hidden_TD

    def _capture_size(self, size: int) -> _Graph:
        inputs = self._put(size, [], [], TokenLayout([], [], []))
        self._staging.send()
        replay, hidden_TD = self._capture(lambda: self._compute(inputs))
        return _Graph(inputs, replay, hidden_TD)

    def _compute(self, inputs: StepInputs) -> torch.Tensor:
        context = StepContext(self._attention, inputs.plan, self._kv_cache)
        return self._model.forward(inputs.token_ids_T, inputs.positions_T, context)

    def _put(self, size: int, token_ids: list[int], positions: list[int], layout: TokenLayout) -> StepInputs:
        num = size - len(token_ids)
        layout = self._padded(layout, num)
        return StepInputs.put(token_ids + [0] * num, positions + [0] * num, layout, self._attention, self._staging)

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
