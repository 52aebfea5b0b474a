"""Stop strings are found wherever the text is cut, nothing of them leaks, and the time is linear."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text.stop_matcher import StopMatcher

ALPHABET = "ab\n"
TEXTS = st.text(ALPHABET, max_size=40)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(stops, include)
    sent = []
    for piece in pieces:
        safe, matched = matcher.push(piece)
        sent.append(safe)
        if matched is not None:
            return "".join(sent), matched, sent
    sent.append(matcher.finish())
    return "".join(sent), None, sent


def by_definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop that ends first, the longer of two that end together."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(text=TEXTS, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 40)))
def test_the_result_is_the_definition_whatever_the_cuts(text, stops, include, cuts):
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(borders)]
    kept, matched, _ = run(pieces, stops, include)
    assert (kept, matched) == by_definition(text, stops, include)


@given(text=TEXTS, stops=STOPS)
def test_only_what_may_become_a_stop_is_held_back(text, stops):
    matcher, sent = StopMatcher(stops), ""
    for end, char in enumerate(text, 1):
        safe, matched = matcher.push(char)
        sent += safe
        if matched is not None:
            return
        longest = max((n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])), default=0)
        assert sent == text[: end - longest]


def test_a_stop_across_three_tokens_does_not_leak():
    assert run(["one \n", "\nUs", "er: two"], ["\n\nUser:"]) == ("one ", "\n\nUser:", ["one ", "", ""])


def test_what_was_held_back_is_given_at_the_end():
    assert run(["one \n", "\nUs"], ["\n\nUser:"]) == ("one \n\nUs", None, ["one ", "", "\n\nUs"])


def test_text_after_the_stop_is_dropped():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", ".")
    assert matcher.push("c") == ("", ".")
    assert matcher.finish() == ""


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_text_that_almost_stops_all_the_time_takes_linear_time():
    def seconds(num: int) -> float:
        matcher = StopMatcher(["a" * 500 + "b"])
        started = time.perf_counter()
        for _ in range(num):
            matcher.push("a" * 10)
        return time.perf_counter() - started

    seconds(100)
    assert min(seconds(20000) for _ in range(3)) < 40 * min(seconds(2000) for _ in range(3))
