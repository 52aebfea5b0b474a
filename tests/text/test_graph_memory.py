"""Room for all decode graphs is left before the KV cache takes the rest: on a device that is a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text.cache_size import cuda_cache_bytes
from serve.text.cuda_graph import MAX_WIDTH, SIZES, VERIFY_SIZES, Shape, decode_shapes
from serve.text.graph_memory import graphs_bytes

MIB = 1 << 20


class Device:
    """The first graph takes a pool for its activations, each takes its nodes and its result."""

    def __init__(self, pool_bytes: int, node_bytes: int, token_bytes: int):
        self.free_bytes = 80 << 30
        self._pool_bytes = pool_bytes
        self._node_bytes = node_bytes
        self._token_bytes = token_bytes
        self.captured: list[Shape] = []

    def capture(self, shape: Shape) -> None:
        pool = self._pool_bytes * shape.num_rows * shape.width
        taken = max((self._pool_bytes * other.num_rows * other.width for other in self.captured), default=0)
        self.captured.append(shape)
        self.free_bytes -= max(0, pool - taken)
        self.free_bytes -= self._node_bytes + shape.num_rows * shape.width * self._token_bytes


@given(
    max_rows=st.integers(1, 300),
    max_width=st.integers(1, MAX_WIDTH),
    pool=st.integers(0, MIB),
    nodes=st.integers(1 << 16, 16 * MIB),
)
def test_all_graphs_fit_what_is_left_for_them(max_rows, max_width, pool, nodes):
    shapes = decode_shapes(max_rows, max_width)
    tried = Device(pool, nodes, token_bytes=100)
    promised = graphs_bytes(shapes, tried.capture, lambda: tried.free_bytes)
    assert tried.captured == [shapes[-1], shapes[0]][: len(shapes)], "two graphs tell of all"
    real = Device(pool, nodes, token_bytes=100)
    before = real.free_bytes
    for shape in reversed(shapes):
        real.capture(shape)
    assert before - real.free_bytes <= promised <= 2 * (before - real.free_bytes) + MIB


def test_memory_that_others_gave_back_meanwhile_is_not_counted_as_less_than_nothing():
    free = iter([100, 200, 200, 300])
    assert graphs_bytes(decode_shapes(8, 1), lambda shape: None, lambda: next(free)) == 0


def test_shapes_are_twenty_sizes_of_decodes_and_fewer_for_each_number_of_drafts():
    assert [shape.num_rows for shape in decode_shapes(256, 1)] == list(SIZES) and len(SIZES) == 20
    shapes = decode_shapes(1000, 4)
    assert len(set(shapes)) == len(shapes) == len(SIZES) + 3 * len(VERIFY_SIZES)
    assert shapes[0] == Shape(1, 1)
    num_tokens = [shape.num_rows * shape.width for shape in shapes]
    assert num_tokens == sorted(num_tokens)
    assert {shape.width for shape in decode_shapes(4, 30)} == set(range(1, MAX_WIDTH + 1))


@pytest.mark.parametrize(("limit", "left"), [(100, 40), (60, 0), (10, 0)])
def test_the_cache_gets_what_weights_a_step_and_the_graphs_leave(limit, left, caplog):
    with caplog.at_level("INFO"):
        assert cuda_cache_bytes(limit, held_bytes=40, step_bytes=15, graph_bytes=5) == left
    assert f"step_bytes=15 graph_bytes=5 kv_cache_bytes={left}" in caplog.text
