"""Decode steps as CUDA graphs: one launch instead of some hundreds, which at small batches is most of a step's time.

A graph is a forward over a fixed number of rows with as many new tokens each: one, or one and some drafts to verify. It
reads its inputs where the step's one copy from the host puts them: the staging buffer never moves, and a step of the
same shape puts the same sizes in the same order. Rows that a step does not fill compute the padding token in the
runner's own block. A few shapes are captured before the replica is ready, the others one by one while the engine is
idle, or when a batch wants them sooner (each costs two forwards): without a compiler there is nothing to wait for.

The plan of such a step is made by the attention backend as always. So a backend is capturable when its plans for one
shape differ in the content of their tensors and in the length of block tables, which it puts last, and in nothing else;
it says so by `is_capturable`. A step whose inputs lie elsewhere all the same (block tables beyond the buffer) is
computed without a graph.

Logits and draws stay outside. Results are read after the replay, so graphs cannot share their memory, and the logits of
all sizes would take 740 MB at a vocabulary of 128k; which kernels draw depends on what the rows ask; and both are a
handful of launches, made while the device computes the step before.

Legend: T tokens of a step, D hidden size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from models.attention.base import AttentionBackend, TokenLayout
from models.staging import Staging
from models.text.base import CausalLM, StepContext
from serve.text.step_inputs import StepInputs

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows of the graphs; a larger batch is computed without one (its kernels are long enough to hide their launches)."""
MAX_WIDTH = 9
"""New tokens of a row, at most: eight drafts."""
VERIFY_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""The same where rows have drafts: fewer, for each number of drafts has its own, and a row in vain costs little."""

Forward = Callable[[], torch.Tensor]
Capture = Callable[[Forward], tuple[Callable[[], None], torch.Tensor]]
"""From a forward over fixed buffers to a function that computes it again and the tensor it then fills."""


class Shape(NamedTuple):
    num_rows: int
    width: int
    """New tokens of each row: one, and the drafts."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """One shape: where it reads, a function to call, a result to read."""

    inputs: StepInputs
    replay: Callable[[], None]
    hidden_TD: torch.Tensor


class DecodeGraphs:
    """The graphs of one runner. `own_table`: blocks for what padding rows write, enough for `max_width` positions."""

    def __init__(
        self,
        model: CausalLM,
        attention: AttentionBackend,
        kv_cache: list[Any],
        *,
        staging: Staging,
        own_table: array[int],
        max_rows: int,
        max_width: int = 1,
        capture: Capture | None = None,
    ):
        """`max_width`: new tokens of a row, at most; more than 1 where drafts are verified."""
        self._model = model
        self._attention = attention
        self._kv_cache = kv_cache
        self._staging = staging
        self._own_table = own_table
        self._capture = capture or _Pool()
        self.shapes = decode_shapes(max_rows, max_width)
        self._sizes: dict[int, list[int]] = {}
        """Numbers of rows, ascending, by width."""
        for shape in self.shapes:
            self._sizes.setdefault(shape.width, []).append(shape.num_rows)
        self._graphs: dict[Shape, _Graph] = {}

    def warm_up(self) -> None:
        """Capture the largest shape first, whose memory the others reuse, and those a lone user needs."""
        widths = 1, max(self._sizes)
        for shape in reversed(self.shapes):
            if shape == self.shapes[-1] or (shape.num_rows in (1, 8) and shape.width in widths):
                self.capture(shape)

    def capture_next(self) -> bool:
        """Capture the smallest shape that is missing, if any; False when none is left."""
        missing = [shape for shape in self.shapes if shape not in self._graphs]
        if missing:
            self.capture(missing[0])
        return len(missing) > 1

    def covers(self, layout: TokenLayout) -> bool:
        """Whether there is a graph for this step: all rows have the same few new tokens."""
        sizes, num_new = self._sizes.get(layout.num_new[0]), layout.num_new
        return sizes is not None and len(num_new) <= sizes[-1] and num_new.count(num_new[0]) == len(num_new)

    def put(self, token_ids: list[int], positions: list[int], layout: TokenLayout) -> StepInputs:
        """The first puts of a step that is covered: as many rows as the next larger graph."""
        shape = self._shape(layout)
        if shape not in self._graphs:
            self.capture(shape)
        return self._put(shape, token_ids, positions, layout)

    def forward(self, inputs: StepInputs, layout: TokenLayout) -> torch.Tensor:
        """hidden_TD of what `put` gave for this layout, padding included. Valid until the next call."""
        graph = self._graphs[self._shape(layout)]
        if not inputs.lie_where(graph.inputs):
            return self._compute(inputs)
        graph.replay()
        return graph.hidden_TD

    def capture(self, shape: Shape) -> None:
        inputs = self._put(shape, [], [], TokenLayout([], [], []))
        self._staging.send()
        replay, hidden_TD = self._capture(lambda: self._compute(inputs))
        self._graphs[shape] = _Graph(inputs, replay, hidden_TD)

    def _shape(self, layout: TokenLayout) -> Shape:
        width = layout.num_new[0]
        sizes = self._sizes[width]
        return Shape(sizes[bisect_left(sizes, len(layout.num_new))], width)

    def _compute(self, inputs: StepInputs) -> torch.Tensor:
        context = StepContext(self._attention, inputs.plan, self._kv_cache)
        return self._model.forward(inputs.token_ids_T, inputs.positions_T, context)

    def _put(self, shape: Shape, token_ids: list[int], positions: list[int], layout: TokenLayout) -> StepInputs:
        num_rows = shape.num_rows - len(layout.num_new)
        behind = layout.behind
        padded = TokenLayout(
            [*layout.num_new, *[shape.width] * num_rows],
            [*layout.num_computed, *[0] * num_rows],
            [*layout.block_tables, *[self._own_table] * num_rows],
            None if behind is None else torch.nn.functional.pad(behind, (0, num_rows)),
        )
        token_ids = token_ids + [0] * (num_rows * shape.width)
        positions = positions + list(range(shape.width)) * num_rows
        return StepInputs.put(token_ids, positions, padded, self._attention, self._staging)


def decode_shapes(max_rows: int, max_width: int) -> list[Shape]:
    """Of the graphs for up to so many rows with up to so many new tokens, smallest first."""
    shapes = []
    for width in range(1, min(max_width, MAX_WIDTH) + 1):
        sizes = SIZES if width == 1 else VERIFY_SIZES
        shapes += [Shape(size, width) for size in sizes[: bisect_left(sizes, max_rows) + 1]]
    return sorted(shapes, key=_num_tokens)


def _num_tokens(shape: Shape) -> tuple[int, int]:
    return shape.num_rows * shape.width, shape.width


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
