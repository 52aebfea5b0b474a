"""What the driver says of a step is what the peers understand, whatever was said before."""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from token_device import VOCAB, RandomLength, TokenDevice, beam_group, make_scheduler, require, sequence

from models.attention.base import TokenLayout
from serve.engine.engine import Engine
from serve.errors import ContextTooLong
from serve.text.sequence import PENDING, TokenBatch
from serve.text.step_message import Step, StepDecoder, StepEncoder

BLOCK = 4


def step_of(rows: list[tuple[list[int], int, list[int]]], **others) -> Step:
    """Rows are (token ids, start, block table)."""
    ids = [token_id for new, _, _ in rows for token_id in new]
    positions = [start + i for new, start, _ in rows for i in range(len(new))]
    tables = [table if isinstance(table, array) else array("i", table) for _, _, table in rows]
    layout = TokenLayout([len(new) for new, _, _ in rows], [row[1] for row in rows], tables)
    return Step(ids, positions, layout, **others)


def copy_of(step: Step) -> Step:
    """As it is now, its tables as far as the step needs them: they may grow later."""
    layout = step.layout
    ends = [start + num for start, num in zip(layout.num_computed, layout.num_new)]
    tables = [table[: -(-end // BLOCK)] for table, end in zip(layout.block_tables, ends)]
    return replace(step, layout=replace(layout, block_tables=tables))


class Wire:
    """An encoder and two decoders, who must agree."""

    def __init__(self, capacity: int = 64):
        self.encoder = StepEncoder(capacity, BLOCK)
        self.decoders = [StepDecoder(), StepDecoder()]
        self.num_bytes = 0

    def carry(self, step: Step) -> Step:
        message = bytes(self.encoder.encode(step))
        self.num_bytes = len(message)
        got, other = (decoder.decode(memoryview(message)) for decoder in self.decoders)
        assert got == other
        return got


def test_all_of_a_step_arrives():
    step = step_of(
        [([5], 9, [3, 1, 7]), ([1, 2, 3], 4, [0, 2])],
        wanted=[3, 0],
        scored=[(1, 2), (2, 4)],
        copies=[(8, 9)],
        pending=[0],
    )
    assert Wire().carry(step) == step


def test_a_table_is_sent_once_and_then_what_is_appended():
    wire, table = Wire(), array("i", range(500))
    wire.carry(step_of([([1], 1999, table)]))
    assert wire.num_bytes > 2000
    table.append(7)
    assert wire.carry(step_of([([1], 2000, table)])).layout.block_tables == [table]
    assert wire.num_bytes < 100
    wire.carry(step_of([([1], 2001, table)]))
    assert wire.num_bytes < 60


def test_a_peers_table_is_the_same_array_while_the_sequence_s_is_and_another_when_not():
    """Attention keeps copies of what a table's blocks hold."""
    wire, table = Wire(), array("i", [1, 2])
    (first,) = wire.carry(step_of([([1], 7, table)])).layout.block_tables
    table.append(3)
    (second,) = wire.carry(step_of([([1], 8, table)])).layout.block_tables
    assert first is second
    (third,) = wire.carry(step_of([([1], 8, array("i", table))])).layout.block_tables
    assert third is not second


def test_blocks_of_rejected_drafts_are_taken_back():
    wire, table = Wire(), array("i", [1, 2, 3])
    wire.carry(step_of([([1, 5, 6], 7, table)]))
    del table[2:]
    table.append(9)
    assert wire.carry(step_of([([1], 8, table)])).layout.block_tables == [array("i", [1, 2, 9])]


def test_blocks_for_drafts_that_nobody_proposed_are_taken_back():
    wire, table = Wire(), array("i", [1, 2, 3])
    wire.carry(step_of([([1], 7, table)]))
    del table[2:]
    table.append(9)
    assert wire.carry(step_of([([1], 8, table)])).layout.block_tables == [array("i", [1, 2, 9])]


def test_slots_of_ended_sequences_are_used_again():
    wire = Wire(capacity=4)
    for i in range(100):
        step = step_of([([1], 0, [i]), ([2], 0, [i, i])])
        assert wire.carry(step) == step
    assert all(len(decoder._tables) <= 3 * 4 for decoder in wire.decoders)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), capacity=st.integers(3, 9))
def test_random_histories_of_tables_arrive(data, capacity):
    """Tables appear, grow, lose what drafts took, are replaced, rest and come back, in any order."""
    wire = Wire(capacity)
    tables: list[array[int]] = []
    starts: list[int] = []
    blocks = st.integers(0, 50)
    for _ in range(data.draw(st.integers(1, 30))):
        if not tables or data.draw(st.booleans()):
            tables.append(array("i", data.draw(st.lists(blocks, min_size=1, max_size=5))))
            starts.append(len(tables[-1]) * BLOCK - data.draw(st.integers(1, BLOCK)))
        rows = []
        for index in data.draw(st.lists(st.integers(0, len(tables) - 1), max_size=3, unique=True)):
            if data.draw(st.integers(0, 5)) == 0:
                tables[index] = array("i", tables[index])
            table, start = tables[index], starts[index]
            num_room = data.draw(st.sampled_from([0, 0, 1, 3, 5]))  # for drafts, of which some are proposed
            num_drafts = data.draw(st.integers(0, num_room))
            while len(table) * BLOCK < start + 1 + num_room:
                table.append(data.draw(blocks))
            rows.append(([7] * (1 + num_drafts), start, table))
            starts[index] += 1 + data.draw(st.integers(0, num_drafts))
        expected = copy_of(step_of(rows))
        assert copy_of(wire.carry(step_of(rows))) == expected
        for table, start in zip(tables, starts):
            del table[start // BLOCK + 1 :]


@st.composite
def jobs(draw, name: str):
    prompt = [(i * i) % VOCAB for i in range(draw(st.sampled_from([1, 6, 9, 14])))]
    if draw(st.integers(0, 2)) == 2:
        return beam_group(prompt, 3, name, max_tokens=draw(st.integers(1, 12)))
    return sequence(prompt, name, max_tokens=draw(st.integers(1, 20)), prompt_logprobs=draw(st.sampled_from([None, 0])))


class Overhearing(TokenDevice):
    """Sends every batch over a wire and compares what arrives."""

    def __init__(self, num_blocks: int, capacity: int):
        super().__init__(num_blocks, BLOCK)
        self.wire = Wire(capacity)

    def submit(self, batch: TokenBatch):
        handle = super().submit(batch)
        rows = [(row.token_ids + row.drafts, row.start, row.block_table) for row in batch.rows]
        step = step_of(rows, copies=batch.copies)
        step.pending = [place for place, token_id in enumerate(step.token_ids) if token_id == PENDING]
        require(copy_of(self.wire.carry(step)) == copy_of(step), "a step that arrives differently")
        return handle


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    depth=st.sampled_from([0, 1, 3]),
    num_drafts=st.sampled_from([0, 2, 5]),
    num_blocks=st.sampled_from([11, 14, 40]),
)
def test_every_step_of_the_scheduler_arrives(data, depth, num_drafts, num_blocks):
    """With preemption, readmission, shared prefixes, forks of beams and drafts that come and go."""
    scheduler = make_scheduler(
        num_blocks, BLOCK, max_num_seqs=6, max_num_batched_tokens=16, max_model_len=40,
        draft_length=RandomLength(num_drafts),
    )  # fmt: skip
    engine = Engine(scheduler, Overhearing(num_blocks, capacity=7), depth=depth)
    for i in range(data.draw(st.integers(1, 8))):
        with suppress(ContextTooLong):
            engine.submit(data.draw(jobs(f"job-{i}")))
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
    while engine.step():
        pass
    engine.check_health()
