"""Ranks add, gather and hand on what one rank would hold; shares of a model cover it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import RankFailed, run_ranks

from models import parallel
from models.parallel import ALONE, Place, even_share, head_share, layer_range, vocabulary_share

SHAPES = [(4, 64), (1, 1023), (130, 77)]


def contribution(rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def sums_and_gathers(rank: int, num_ranks: int) -> list[tuple[torch.Tensor, ...]]:
    place = Place.join(rank, tensor_size=num_ranks)
    own = [contribution(rank, shape) for shape in SHAPES]
    small = [place.sum_(x.clone()) for x in own]
    parallel.SMALL_SUM_BYTES = 0
    return [
        (total, place.sum_(x.clone()), place.gather(x, 0), place.gather(x, -1))
        for x, total in zip(own, small, strict=True)
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_shard_gets_the_sum_in_the_order_of_ranks_and_the_whole(num_ranks: int) -> None:
    for of_rank in run_ranks(num_ranks, sums_and_gathers, num_ranks):
        for shape, (small, large, rows, columns) in zip(SHAPES, of_rank, strict=True):
            parts = [contribution(rank, shape) for rank in range(num_ranks)]
            expected = parts[0].clone()
            for part in parts[1:]:
                expected += part
            assert torch.equal(small, expected) and torch.equal(large, expected)
            assert torch.equal(rows, torch.cat(parts, 0))
            assert torch.equal(columns, torch.cat(parts, -1))


def relay(rank: int, num_items: int) -> list[float]:
    """Every stage adds its number to what it receives; the first sends all before the last takes one."""
    place = Place.join(rank, num_stages=3)
    received = []
    for item in range(num_items):
        x = torch.full((2, 3), float(item))
        if not place.is_first:
            x = place.receive(torch.empty(2, 3)) + place.stage
        if place.is_last:
            received.append(float(x.sum() / 6))
        else:
            place.send(x)
    place.flush()
    return received


def test_stages_receive_in_the_order_of_sending() -> None:
    assert run_ranks(3, relay, 12)[2] == [item + 3.0 for item in range(12)]


def failing(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("no weights here")
    torch.distributed.barrier()


def test_error_of_a_rank_is_the_error_of_the_test() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1:.*no weights here"):
        run_ranks(2, failing)


def test_alone_is_first_and_last_and_talks_to_nobody() -> None:
    x = torch.randn(3, 4)
    assert ALONE.is_alone and ALONE.is_first and ALONE.is_last and ALONE.rank == 0
    assert ALONE.sum_(x) is x and ALONE.gather(x, -1) is x


@pytest.mark.parametrize("share", [layer_range, even_share, vocabulary_share])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [7, 8, 28, 269])
def test_shares_cover_everything_once(share: Callable[..., Any], num_ranks: int, size: int) -> None:
    shares = [share(size, rank, num_ranks) for rank in range(num_ranks)]
    assert [index for part in shares for index in part] == list(range(size))
    sizes = [len(part) for part in shares]
    assert share is vocabulary_share or max(sizes) - min(sizes) <= 1
    assert share is not layer_range or sizes[-1] == min(sizes)


def test_key_value_heads_are_split_or_stand_for_several_ranks() -> None:
    assert [head_share(8, rank, 4) for rank in range(4)] == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert [head_share(2, rank, 4) for rank in range(4)] == [range(1), range(1), range(1, 2), range(1, 2)]
    with pytest.raises(ValueError, match="6 heads cannot be split over 4 ranks"):
        head_share(6, 0, 4)
