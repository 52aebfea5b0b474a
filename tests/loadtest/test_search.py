"""The highest rate: on servers whose capacity is known."""

from __future__ import annotations

import asyncio

import pytest

from loadtest.search import Search, Tried


def find(carries, *, start: float = 1.0, limit: float = 1000.0, tolerance: float = 0.05) -> tuple[float, Search]:
    """`carries(rate, is_confirmation)`: whether enough requests are good."""

    async def trial(rate: float, is_confirmation: bool) -> Tried:
        found = carries(rate, is_confirmation)
        return found if isinstance(found, Tried) else Tried(rate, found, is_confirmation)

    search = Search(start, limit, tolerance)
    return asyncio.run(search(trial)), search


@pytest.mark.parametrize("capacity", [0.07, 1.0, 3.3, 17.0, 250.0])
def test_the_rate_is_found_to_within_the_tolerance_and_never_above(capacity):
    rate, search = find(lambda rate, _: rate <= capacity)
    assert capacity / 1.05 <= rate <= capacity
    assert len(search.tried) < 20 and search.tried[-1] == Tried(rate, True, True)


def test_a_rate_that_does_not_hold_again_is_given_up_for_a_lower_one():
    rate, search = find(lambda rate, is_again: rate <= (8.0 if is_again else 10.0))
    assert rate <= 8.0 and rate > 4.0
    assert search.tried[-1].is_confirmation and search.tried[-1].is_good


def test_a_server_that_carries_nothing_is_told_as_zero():
    rate, search = find(lambda rate, _: False)
    assert rate == 0.0 and len(search.tried) < 12


def test_no_rate_above_the_limit_is_tried():
    rate, search = find(lambda rate, _: True, limit=50.0)
    assert rate == 50.0 and max(one.rate for one in search.tried) == 50.0


def test_a_lost_server_ends_the_search():
    rate, search = find(lambda rate, _: Tried(rate, False, is_lost=True) if rate > 3 else True)
    assert rate == 0.0 and [one.rate for one in search.tried] == [1.0, 2.0, 4.0]
