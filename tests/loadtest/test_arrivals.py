"""When requests are sent: the statistics of each process, and that a seed fixes them."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from loadtest.traffic.arrivals import Stage, constant_rate, first, parse_stages, replayed, staged


def gaps(offsets: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(offsets)]


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness):
    """Over 20 000 gaps of one fixed seed; the means of others stay within 2 % too."""
    found = gaps(first(constant_rate(50.0, burstiness=burstiness, seed=3), num=20_001, duration_s=None))
    assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.03)
    variation = statistics.pstdev(found) / statistics.fmean(found)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_poisson_process_has_as_many_requests_in_a_second_as_their_variance():
    offsets = first(constant_rate(20.0, seed=1), num=None, duration_s=2000.0)
    per_second = [0] * 2000
    for offset in offsets:
        per_second[int(offset)] += 1
    assert statistics.fmean(per_second) == pytest.approx(20, rel=0.03)
    assert statistics.pvariance(per_second) == pytest.approx(20, rel=0.1)


def test_infinite_burstiness_is_evenly_spaced_and_an_infinite_rate_is_at_once():
    assert first(constant_rate(4.0, burstiness=math.inf), num=4, duration_s=None) == [0.0, 0.25, 0.5, 0.75]
    assert first(constant_rate(math.inf), num=3, duration_s=None) == [0.0, 0.0, 0.0]


def test_a_seed_fixes_the_times_and_the_rate_only_stretches_them():
    slow, fast = (first(constant_rate(rate, seed=5), num=50, duration_s=None) for rate in (1.0, 10.0))
    assert slow == pytest.approx([10 * offset for offset in fast])
    assert slow != first(constant_rate(1.0, seed=6), num=50, duration_s=None)


@pytest.mark.parametrize("is_exponential", [False, True])
def test_a_ramp_has_as_many_requests_as_the_integral_of_its_rate(is_exponential):
    stage = Stage(2.0, 100.0, 50.0, is_exponential)
    offsets = list(staged([stage], burstiness=math.inf))
    whole = 48 / math.log(25) * 100 if is_exponential else 26 * 100
    assert len(offsets) == pytest.approx(whole, abs=1.5)
    half = 2 * math.expm1(math.log(25) / 2) / math.log(25) * 100 if is_exponential else (2 + 26) / 2 * 50
    assert sum(offset < 50 for offset in offsets) == pytest.approx(half, abs=1.5)
    assert offsets == sorted(offsets) and offsets[-1] < 100


def test_stages_follow_each_other_at_their_own_rates():
    offsets = list(staged(parse_stages("2x10, 20x10,20-2x10"), burstiness=math.inf))
    counts = [sum(begin <= offset < begin + 10 for offset in offsets) for begin in (0, 10, 20)]
    assert counts == [pytest.approx(20, abs=1), pytest.approx(200, abs=1), pytest.approx(110, abs=1)]


@pytest.mark.parametrize("text", ["2", "x3", "0x5", "1-x5", "-2x5", "infx5", "2x5,"])
def test_stages_that_make_no_sense_are_refused_by_name(text):
    with pytest.raises(ValueError, match="stage"):
        parse_stages(text)


def test_a_trace_is_replayed_at_its_speed_and_again_from_its_beginning():
    again = replayed([0.0, 1.0, 5.0], speed=2.0)
    assert first(again, num=5, duration_s=None) == [0.0, 0.5, 2.5, 3.75, 4.25]
    assert first(replayed([0.0]), num=3, duration_s=None) == [0.0, 1.0, 2.0]
