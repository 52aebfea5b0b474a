"""Prompt lookup: the latest continuation of the longest n-gram, found in linear time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.text.speculation.prompt_lookup import PromptLookup, _Index


def continuation(token_ids, num_tokens=4, *, least=2, most=4):
    return PromptLookup(least, most).continuation(list(token_ids), num_tokens, _Index())


def test_what_followed_the_same_tokens_before_is_proposed():
    assert continuation([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6, 7]


def test_the_longest_match_wins_then_the_latest():
    assert continuation([1, 2, 3, 8, 8, 2, 3, 9, 9, 1, 2, 3], 2) == [8, 8]
    assert continuation([2, 3, 8, 8, 2, 3, 9, 9, 2, 3], 2) == [9, 9]


def test_a_period_is_continued_beyond_the_end():
    assert continuation([7, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_nothing_is_proposed_for_what_is_new():
    assert continuation([1, 2, 3, 4]) == continuation([1]) == continuation([]) == []


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_growing_step_by_step_gives_what_a_search_of_the_whole_gives(token_ids, least, more, num_tokens, stride):
    lookup, index = PromptLookup(least, least + more), _Index()
    for end in range(0, len(token_ids) + 1, stride):
        known = token_ids[:end]
        expected: list[int] = []
        for size in range(min(least + more, end - 1), least - 1, -1):
            ends = [at for at in range(size, end) if known[at - size : at] == known[end - size :]]
            if ends:
                expected = [known[ends[-1] + i % (end - ends[-1])] for i in range(num_tokens)]
                break
        assert lookup.continuation(known, num_tokens, index) == expected
