"""What is put arrives by one copy, at the same place every step; what is overwritten too early is found."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from async_device import AsyncQueue, Overlap
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention.base import TokenLayout
from models.staging import ALIGN, Staging

CPU = torch.device("cpu")
DTYPES = {torch.int64: 40, torch.int32: 20, torch.float32: 10, torch.float64: 50, torch.uint8: 7}
PARTS = st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.integers(0, 40)), max_size=8)


@given(st.lists(PARTS, min_size=1, max_size=6), st.sampled_from([ALIGN * 4, 1 << 14]))
@settings(max_examples=60, deadline=None)
def test_all_that_is_put_arrives_and_costs_one_copy_a_step_where_it_fits(steps, capacity):
    queue = AsyncQueue()
    staging = Staging(CPU, capacity, queue)
    for parts in steps:
        before = staging.num_copies, staging.num_spilled
        wanted = [torch.arange(size).add(DTYPES[dtype]).to(dtype) for dtype, size in parts]
        found = [
            staging.put(values.numpy() if i % 2 else values.tolist(), values.dtype) for i, values in enumerate(wanted)
        ]
        staging.send()
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other) and one.data_ptr() % 16 == 0
        copies, spilled = staging.num_copies - before[0], staging.num_spilled - before[1]
        assert copies - spilled <= 1
        assert capacity < 1 << 14 or not spilled
    queue.advance()
    assert queue.num_uploads == staging.num_copies


def test_equal_sizes_are_at_the_same_place_every_step_whatever_comes_last():
    staging = Staging(CPU, 1 << 14, AsyncQueue())

    def addresses(num_last: int) -> list[int]:
        parts = [
            staging.put([1] * 5, torch.int64),
            staging.put(np.ones((3, 2)), torch.int32),
            staging.place(torch.ones(4)),
            staging.put([1] * num_last, torch.int32),
        ]
        staging.send()
        return [part.data_ptr() for part in parts]

    assert addresses(3) == addresses(300) == addresses(1)


def test_what_the_device_alone_knows_is_in_its_place_after_the_send():
    staging = Staging(CPU, 1 << 14, AsyncQueue())
    known = torch.tensor([5, 6, 7], dtype=torch.int32)
    placed, rest = staging.place(known), staging.put([1, 2], torch.int64)
    staging.send()
    assert placed.tolist() == [5, 6, 7] and placed.data_ptr() != known.data_ptr() and rest.tolist() == [1, 2]


def test_a_buffer_is_not_written_while_its_copy_is_under_way():
    queue = AsyncQueue()
    staging = Staging(CPU, 1 << 10, queue)
    for step in range(20):
        assert staging.put([step] * 30, torch.int64).shape == (30,)
        staging.send()
    queue.advance()
    assert queue.num_waits == 17, "the first three find a free buffer"


def test_writing_too_early_and_reading_too_early_are_found():
    queue = AsyncQueue()
    source = queue.pinned(8)
    queue.upload(source, torch.empty(8, dtype=torch.uint8))
    result = queue.download(torch.arange(3))
    assert (result < 0).all(), "poison"
    source[0] = 1
    with pytest.raises(Overlap, match="pinned"):
        queue.mark().synchronize()


def test_on_cpu_a_put_is_a_tensor_of_its_own_and_nothing_is_copied():
    staging = Staging(CPU)
    values = np.arange(4)
    tensor = staging.put(values, torch.int64)
    staging.send()
    assert tensor.data_ptr() == values.ctypes.data and staging.num_copies == 0
    assert staging.place(tensor) is tensor


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=6), st.booleans())
def test_flat_tables_hold_every_table_from_its_start(tables, are_arrays):
    given_tables = [array("i", table) for table in tables] if are_arrays else tables
    blocks, starts = TokenLayout([1] * len(tables), [0] * len(tables), given_tables).flat_tables()
    assert blocks.dtype == starts.dtype == np.int32
    for table, start in zip(tables, starts, strict=True):
        assert blocks[start : start + len(table)].tolist() == table
    assert len(blocks) == sum(map(len, tables))
