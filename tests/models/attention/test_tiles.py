"""However a step is cut, each query meets each of its keys once; and decodes are cut alike, whatever they hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention.base import TokenLayout
from models.attention.tiles import MAX_PARTS, Launch, TileSizes, cut

sequences = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 4, 7, 33, 130, 700]), st.sampled_from([0, 1, 15, 16, 17, 500, 70_000])),
    min_size=1,
    max_size=12,
)
programs = st.sampled_from([2, 16, 264])
sizes = st.builds(TileSizes, st.sampled_from([16, 64]), st.sampled_from([16, 128]), programs, programs)
starts = st.lists(st.sampled_from([0, 3, 900, 40_000]), min_size=1, max_size=30)
groups = st.sampled_from([1, 3, 4, 8, 40])
kv_heads = st.sampled_from([1, 2, 8])


def layout_of(pairs: list[tuple[int, int]]) -> TokenLayout:
    return TokenLayout([new for new, _ in pairs], [start for _, start in pairs], [[0]] * len(pairs))


def parts_of(launch: Launch, tile: int) -> list[int]:
    return [part for of, part in launch.items_I2.tolist() if of == tile and part < launch.tiles_M6[tile, 5]]


@settings(max_examples=100, deadline=None)
@given(sequences, sizes, groups, kv_heads)
def test_every_token_is_in_one_tile_and_every_part_of_it_in_one_item(pairs, sizes, num_groups, num_kv_heads):
    launches = cut(layout_of(pairs), sizes, num_groups=num_groups, num_kv_heads=num_kv_heads)
    starts = np.cumsum([0] + [new for new, _ in pairs])
    seen = []
    for launch in launches:
        assert launch.max_queries * num_groups <= launch.num_rows
        for tile, (sequence, row, position, queries, first_item, parts) in enumerate(launch.tiles_M6.tolist()):
            assert 1 <= queries <= launch.max_queries and 1 <= parts <= MAX_PARTS
            assert position - pairs[sequence][1] == row - starts[sequence], "row and position move together"
            assert parts_of(launch, tile) == list(range(parts))
            assert [of for of, _ in launch.items_I2[first_item : first_item + parts].tolist()] == [tile] * parts
            assert parts == 1 or launch.is_split, "what has several parts is put together"
            seen += [(sequence, row + i) for i in range(queries)]
    assert sorted(seen) == [(s, starts[s] + i) for s, (new, _) in enumerate(pairs) for i in range(new)]


@settings(max_examples=100, deadline=None)
@given(starts, st.sampled_from([1, 4]), sizes, kv_heads)
def test_steps_with_equal_numbers_of_tokens_have_tables_of_equal_sizes(starts, num_new, sizes, num_kv_heads):
    """As CUDA graphs need it; the emptiest such step is the one that is captured."""
    ours, captured = (
        cut(layout_of([(num_new, start) for start in some]), sizes, num_groups=4, num_kv_heads=num_kv_heads)
        for some in (starts, [0] * len(starts))
    )
    assert len(ours) == len(captured) == 1
    for one, other in zip(ours, captured, strict=True):
        assert one.tiles_M6.shape == other.tiles_M6.shape and one.items_I2.shape == other.items_I2.shape
        assert (one.num_rows, one.max_queries, one.is_split) == (other.num_rows, other.max_queries, other.is_split)


def test_work_is_shared_out_evenly_among_lone_long_and_many_short_sequences():
    sizes = TileSizes(64, 128, 264, 132)

    def parts(*lengths: int) -> list[int]:
        (launch,) = cut(layout_of([(1, length - 1) for length in lengths]), sizes, num_groups=4, num_kv_heads=8)
        return launch.tiles_M6[:, 5].tolist()

    assert parts(32_768) == [32], "33 have room, for each of 8 heads; parts are whole iterations"
    assert parts(*[1024] * 8) == [4] * 8
    assert parts(*[1024] * 64) == [1] * 64
    assert parts(100_000, *[1024] * 63)[0] > 15, "one long one does not keep its mates waiting"
    assert parts(100) == [1]


def test_with_many_tiles_for_every_program_nothing_is_split_and_nothing_reduced():
    sizes = TileSizes(64, 128, 16, 8)
    (launch,) = cut(layout_of([(1, 5000)] * 32), sizes, num_groups=4, num_kv_heads=8)
    assert not launch.is_split and len(launch.items_I2) == 32
