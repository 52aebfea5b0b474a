"""The rule of `serve/autoscaling.py`: bounds, monotony, both delays, and that a constant load comes to rest."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.autoscaling import Autoscaler, Signals
from serve.options import AutoscalingOptions

T = 1.0


def options(**changed) -> AutoscalingOptions:
    return AutoscalingOptions(**{"max_replicas": 100, "upscale_delay_s": 0.0, **changed})


def decide(signals, *, num_target=None, now=0.0, scaler=None, num_held=0, num_ready=None, **changed):
    num_target = len(signals) if num_target is None else num_target
    scaler = scaler or Autoscaler(options(**changed))
    num_ready = len(signals) if num_ready is None else num_ready
    return scaler.decide(signals, num_target=num_target, num_ready=num_ready, num_held=num_held, now=now)


shares = st.floats(0, 1)
signals = st.builds(
    Signals, work=st.floats(0, 20), wait_s=st.floats(0, 300), memory=shares, late=shares, jobs=st.floats(0, 300),
    load_s=st.floats(0, 120),
)  # fmt: skip
reports = st.lists(signals, min_size=1, max_size=8)


# -- one decision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "number", "reason"),
    [
        (Signals(work=2.0, jobs=1), 3, "work"),
        (Signals(work=0.7, jobs=1), 1, "steady"),
        (Signals(memory=0.81, jobs=1), 2, "memory"),
        (Signals(work=0.5, wait_s=4.0, jobs=1), 4, "backlog"),
        (Signals(work=0.5, wait_s=4.0, jobs=1, load_s=30.0), 1, "steady"),  # worked off before another one is up
        (Signals(work=0.5, wait_s=61.0, jobs=1, load_s=30.0), 3, "backlog"),
    ],
)
def test_each_term_asks_for_what_it_says(one, number, reason):
    decision = decide([one])
    assert (decision.num_replicas, decision.reason) == (number, reason)


@given(reports, st.integers(0, 10), st.integers(0, 10), st.integers(0, 3), st.integers(0, 4), st.integers(1, 12))
def test_the_number_stays_in_its_bounds(reports, num_target, num_ready, num_held, least, most):
    scaler = Autoscaler(options(min_replicas=min(least, most), max_replicas=most))
    for now in (0.0, 100.0, 1e4):
        num_target = scaler.decide(
            reports, num_target=num_target, num_ready=num_ready, num_held=num_held, now=now
        ).num_replicas
        assert min(least, most) <= num_target <= most


@given(reports, st.sampled_from(["work", "wait_s", "memory", "late"]), st.integers(0, 7), st.floats(0, 50))
def test_more_load_never_asks_for_fewer_replicas(reports, name, which, more):
    which %= len(reports)
    value = getattr(reports[which], name) + more
    grown = list(reports)
    grown[which] = replace(grown[which], **{name: min(value, 1.0) if name in ("memory", "late") else value})

    def number(signals):
        scaler = Autoscaler(options(downscale_delay_s=0.0))
        [decide(signals, num_target=len(reports), scaler=scaler, now=now) for now in (0.0, 200.0)]
        return decide(signals, scaler=scaler, now=400.0).num_replicas

    assert number(grown) >= number(reports)


# -- delays ------------------------------------------------------------------------------------------------------------


def test_up_waits_for_its_delay_without_a_break_and_then_goes_all_the_way():
    scaler, busy, calm = (
        Autoscaler(options(upscale_delay_s=2.0)),
        [Signals(work=3.5, jobs=9)],
        [Signals(work=0.5, jobs=1)],
    )
    assert [decide(busy, scaler=scaler, now=now).num_replicas for now in (0.0, 1.9)] == [1, 1]
    assert decide(calm, scaler=scaler, now=1.95).num_replicas == 1
    assert [decide(busy, scaler=scaler, now=now).num_replicas for now in (2.0, 3.9, 4.0)] == [1, 1, 5]


def test_down_waits_longer_than_a_model_takes_to_load_and_goes_to_the_most_that_was_enough():
    scaler = Autoscaler(options(downscale_delay_s=10.0))
    idle = [Signals(work=0.05, jobs=1, load_s=30.0)] * 5
    some = [Signals(work=0.3, jobs=1, load_s=30.0)] * 5
    assert decide(idle, scaler=scaler, now=0.0).num_replicas == 5
    assert decide(some, scaler=scaler, now=12.0).num_replicas == 5
    assert decide(idle, scaler=scaler, now=29.9).num_replicas == 5
    decision = decide(idle, scaler=scaler, now=30.0)
    assert (decision.num_replicas, decision.reason) == (3, "idle")


def test_a_single_busy_moment_starts_the_wait_for_fewer_anew():
    scaler, idle, busy = Autoscaler(options(downscale_delay_s=60.0)), [Signals()] * 2, [Signals(work=0.7, jobs=1)] * 2
    steps = [(idle, 0.0), (idle, 59.0), (busy, 59.5), (idle, 60.0), (idle, 119.0)]
    assert [decide(signals, scaler=scaler, now=now).num_replicas for signals, now in steps] == [2] * 5
    assert decide(idle, scaler=scaler, now=120.0).num_replicas == 1


@pytest.mark.parametrize("known", [0, 2])
def test_nothing_goes_down_while_a_replica_says_nothing(known):
    scaler = Autoscaler(options(min_replicas=0, downscale_delay_s=1.0))
    for now in (0.0, 10.0, 100.0):
        assert decide([Signals()] * known, num_target=3, num_ready=3, scaler=scaler, now=now).num_replicas == 3


def test_replicas_that_never_come_up_are_given_up_once_they_are_not_needed():
    scaler, busy, calm = (
        Autoscaler(options(downscale_delay_s=10.0)),
        [Signals(work=1.4, jobs=5)],
        [Signals(work=0.4, jobs=1)],
    )
    for signals, now in ((busy, 0.0), (busy, 100.0), (calm, 200.0), (calm, 209.0)):
        assert decide(signals, num_target=2, num_ready=1, scaler=scaler, now=now).num_replicas == 2
    assert decide(calm, num_target=2, num_ready=1, scaler=scaler, now=210.0).num_replicas == 1


def test_zero_is_reached_from_one_with_no_work_at_all():
    scaler = Autoscaler(options(min_replicas=0, downscale_delay_s=5.0, downscale_to_zero_delay_s=50.0))
    idle = Signals(load_s=1.0)
    assert [decide([idle] * 2, scaler=scaler, now=now).num_replicas for now in (0.0, 5.0)] == [2, 1]
    assert [decide([idle], scaler=scaler, now=now).num_replicas for now in (6.0, 55.0)] == [1, 1]
    assert decide([Signals(jobs=1)], scaler=scaler, now=55.5).num_replicas == 1
    assert [decide([idle], scaler=scaler, now=now).num_replicas for now in (56.0, 105.9, 106.0)] == [1, 1, 0]


def test_a_request_that_is_held_wakes_a_model_at_once_and_keeps_it():
    scaler = Autoscaler(options(min_replicas=0, upscale_delay_s=30.0, downscale_delay_s=0.0))
    assert decide([], scaler=scaler).num_replicas == 0
    decision = decide([], num_held=7, scaler=scaler)
    assert (decision.num_replicas, decision.reason) == (1, "held")
    for now in (10.0, 1000.0):  # it loads for as long as it takes
        assert decide([], num_target=1, num_held=7, scaler=scaler, now=now).num_replicas == 1


def test_attainment_adds_one_replica_after_another_where_the_rest_sees_nothing():
    scaler, late = Autoscaler(options(look_back_period_s=10.0)), Signals(work=0.5, wait_s=0.9, late=0.3, jobs=3)
    assert decide([late], scaler=scaler, now=0.0).num_replicas == 1
    decision = decide([late], scaler=scaler, now=10.0)
    assert (decision.num_replicas, decision.reason) == (2, "late")
    assert decide([late], num_target=2, num_ready=1, scaler=scaler, now=40.0).num_replicas == 2  # it is coming up
    assert [decide([late] * 2, scaler=scaler, now=now).num_replicas for now in (50.0, 59.0, 60.0)] == [2, 2, 3]


# -- a constant load ---------------------------------------------------------------------------------------------------


class Queues:
    """Replicas as queues that share a constant load: a fluid of `work` a second, and `scale_s` of wait at half load."""

    def __init__(self, work: float, scale_s: float, load_s: float):
        self.work, self.scale_s, self.load_s = work, scale_s, load_s
        self.backlog_s = 0.0
        self.ready, self.coming = 1, []

    def step(self, num_target: int, now: float, dt: float) -> list[Signals]:
        self.coming = [at for at in self.coming if at > now or self._arrive()]
        while self.ready + len(self.coming) < num_target:
            self.coming.append(now + self.load_s)
        self.ready = min(self.ready, num_target)
        self.backlog_s = max(0.0, self.backlog_s + (self.work - self.ready) * dt)
        if not self.ready:
            return []
        use = self.work / self.ready
        wait_s = self.backlog_s / self.ready + (self.scale_s * use / (1 - use) if use < 0.99 else 100 * self.scale_s)
        late = float(wait_s > T)
        memory = min(1.0, 0.3 * use)
        one = Signals(work=use, wait_s=wait_s, memory=memory, late=late, jobs=use, load_s=self.load_s)
        return [one] * self.ready

    def _arrive(self) -> bool:
        self.ready += 1
        return False


def timeline(work: float, scale_s: float, load_s: float, **changed) -> list[int]:
    """The number that is asked for, every half second."""
    scaler, queues, num_target, numbers = Autoscaler(options(**changed)), Queues(work, scale_s, load_s), 1, []
    for tick in range(3000):
        signals = queues.step(num_target, tick * 0.5, 0.5)
        num_target = scaler.decide(signals, num_target=num_target, num_ready=queues.ready, now=tick * 0.5).num_replicas
        numbers.append(num_target)
    return numbers


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 30.0), st.floats(0.01, 3.0), st.sampled_from([1.0, 10.0, 60.0]))
def test_a_constant_load_comes_to_rest_without_going_back_and_forth(work, scale_s, load_s):
    numbers = timeline(work, scale_s, load_s)
    changes = [after - before for before, after in pairwise(numbers) if after != before]
    first_down = next((i for i, change in enumerate(changes) if change < 0), len(changes))
    assert all(change < 0 for change in changes[first_down:])  # up, then perhaps down, and never up again
    assert len(set(numbers[-1000:])) == 1
    last = numbers[-1]
    assert last == 100 or scale_s * work / (last - work) <= T
    fewest = max(work / 0.7, work + scale_s * work / T)
    assert last <= max(1, math.ceil(fewest / 0.9) + 1)


def test_a_step_of_load_is_answered_at_once_and_given_back():
    scaler, queues, num_target, seen = Autoscaler(options(upscale_delay_s=2.0)), Queues(0.5, 0.3, 20.0), 1, {}
    for tick in range(1200):
        queues.work = 4.0 if 200 <= tick < 600 else 0.5
        signals = queues.step(num_target, tick * 0.5, 0.5)
        num_target = scaler.decide(signals, num_target=num_target, num_ready=queues.ready, now=tick * 0.5).num_replicas
        seen[tick] = num_target
    assert seen[199] == 1 and seen[204] >= 6
    assert seen[1199] == 1
