"""The number of drafts follows measured acceptance and costs. Machines and texts are simulated; no clock is read."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from serve.recorder import EngineObserver, Recorder
from serve.replica import follow_speculation
from serve.request import SamplingParams
from serve.text.sequence import Row, Sequence, TokenBatch, TokenOutput
from serve.text.speculation.draft_length import FIRST_PROBES, PROBE_SHARE, AdaptiveLength

MOST = 5
Cost = Callable[[int, int], float]
"""Seconds of a step, of rows and drafts a row."""


def job(name: str) -> Sequence:
    return Sequence(id=name, token_ids=[1, 2], num_prompt=1, sampling=SamplingParams(max_tokens=9))


JOBS = [job(f"{i}") for i in range(64)]


class Machine:
    """Steps of decodes, each draft right with probability `acceptance` after right ones."""

    def __init__(self, cost: Cost, acceptance: float, *, catch_up_s: float = 0.0, seed: int = 0):
        self.cost, self.acceptance, self.catch_up_s = cost, acceptance, catch_up_s
        self.length = AdaptiveLength(MOST)
        self.random = random.Random(seed)
        self.seconds, self.num_tokens = 0.0, 0
        self.chosen: list[int] = []
        self._last = 0

    def run(self, num_steps: int, num_rows: int) -> list[int]:
        """The numbers of drafts chosen."""
        chosen = [self.step(num_rows) for _ in range(num_steps)]
        self.chosen += chosen
        return chosen

    def step(self, num_rows: int) -> int:
        num_drafts = self.length.choose(num_rows)
        rows, sampled = [], []
        for seq in JOBS[:num_rows]:
            num_accepted = 0
            while num_accepted < num_drafts and self.random.random() < self.acceptance:
                num_accepted += 1
            rows.append(Row(seq, 0, [2], 1, [0], True, 2, num_drafts=num_drafts, drafts=[3] * num_drafts))
            sampled.append((3,) * (num_accepted + 1))
        is_typical = not (num_drafts and not self._last and self.catch_up_s)
        seconds = self.cost(num_rows, num_drafts) * self.random.uniform(0.95, 1.05)
        seconds += 0.0 if is_typical else num_rows * self.catch_up_s
        self._last = num_drafts
        nothing = [None] * num_rows
        self.length.observe(
            TokenBatch(0, rows), TokenOutput(sampled, nothing, nothing, seconds=seconds, is_typical=is_typical)
        )
        self.seconds += seconds
        self.num_tokens += sum(map(len, sampled))
        return num_drafts


def flat(num_rows: int, num_drafts: int) -> float:
    """A step costs the same whatever it computes; a draft a third of it."""
    return 0.003 + 0.001 * num_drafts


def proportional(num_rows: int, num_drafts: int) -> float:
    """Every position costs the same: nothing to gain."""
    return 0.0005 * num_rows * (1 + num_drafts) + 0.001 * num_drafts


def mixed(num_rows: int, num_drafts: int) -> float:
    """Flat up to some positions, then proportional: as on a CPU."""
    return 0.002 + 0.0003 * max(num_rows * (1 + num_drafts), 8) + 0.0006 * num_drafts


def usual(chosen: list[int]) -> int:
    return max(set(chosen), key=chosen.count)


def test_nothing_is_drafted_before_anything_is_known():
    assert AdaptiveLength(MOST).choose(1) == 0


def test_drafts_that_hold_and_cost_little_are_taken_at_once():
    machine = Machine(flat, 0.9)
    machine.run(50, 1)
    assert usual(machine.run(200, 1)) >= 3
    assert machine.num_tokens / machine.seconds > 1.3 / flat(1, 0)


@pytest.mark.parametrize(("cost", "acceptance"), [(proportional, 0.9), (flat, 0.02), (mixed, 0.05)])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_where_drafts_do_not_pay_only_probes_remain_and_they_are_rationed(cost, acceptance, num_rows):
    machine = Machine(cost, acceptance)
    machine.run(4000, num_rows)
    assert usual(machine.chosen[200:]) == 0
    without_s = machine.num_tokens / num_rows * cost(num_rows, 0)
    assert machine.seconds <= without_s * (1.01 + PROBE_SHARE) + 2 * FIRST_PROBES * cost(num_rows, 0)


def test_catching_up_for_a_probe_counts_as_its_loss():
    machine = Machine(proportional, 0.9, catch_up_s=0.01)
    machine.run(4000, 32)
    without_s = machine.num_tokens / 32 * proportional(32, 0)
    first_probes_s = FIRST_PROBES * proportional(32, 0)
    assert machine.seconds <= without_s * (1.01 + PROBE_SHARE) + 2 * first_probes_s + 32 * 0.01


def test_the_number_of_rows_decides():
    machine = Machine(mixed, 0.85)
    for _ in range(8):
        for num_rows in (1, 32):
            machine.run(100, num_rows)
    assert usual(machine.run(50, 1)) >= 2
    assert usual(machine.run(50, 32)) <= 1


def test_it_notices_when_the_text_becomes_predictable_and_when_it_no_longer_is():
    machine = Machine(flat, 0.05)
    machine.run(1000, 2)
    assert usual(machine.chosen[-100:]) == 0
    machine.acceptance = 0.95
    machine.run(3000, 2)
    assert usual(machine.chosen[-100:]) >= 3
    machine.acceptance = 0.05
    machine.run(1000, 2)
    assert usual(machine.chosen[-100:]) == 0


def test_a_pause_of_the_machine_changes_little():
    machine = Machine(flat, 0.9)
    machine.run(300, 1)
    before, machine.cost = usual(machine.chosen[-100:]), lambda rows, drafts: 30.0
    machine.run(1, 1)
    machine.cost = flat
    assert usual(machine.run(100, 1)) == pytest.approx(before, abs=1)


def test_prefills_tell_nothing_about_costs():
    length = AdaptiveLength(MOST)
    row = Row(JOBS[0], 0, [1, 2, 3], 0, [0], True, 3)
    for _ in range(10):
        length.observe(TokenBatch(0, [row]), TokenOutput([(1,)], [None], [None], seconds=5.0))
    assert length.choose(1) == 0 and not length._costs


def test_counters_tell_acceptance_by_position():
    machine = Machine(flat, 1.0)
    machine.run(100, 2)
    machine.acceptance = 0.0
    machine.run(1, 2)
    acceptance = machine.length.acceptance
    assert acceptance.num_accepted == sum(acceptance.by_position) <= acceptance.num_drafted
    assert acceptance.by_position == sorted(acceptance.by_position, reverse=True)
    assert acceptance.mean_length == 1 + acceptance.num_accepted / acceptance.num_rows


def test_the_metrics_follow_the_counters():
    recorder = Recorder("replica-0", "replica")
    machine = Machine(flat, 0.9)
    follow_speculation(EngineObserver(recorder, "m"), machine.length)
    machine.run(100, 2)
    values = {(series.name, *series.labels[1:]): series.values[0] for series in recorder.snapshot().series}
    acceptance, prefix = machine.length.acceptance, "tandem_speculation_"
    assert values[prefix + "drafted_tokens_total",] == acceptance.num_drafted > 0
    assert values[prefix + "accepted_tokens_total",] == acceptance.num_accepted > 0
    assert values[prefix + "mean_accepted_tokens",] == acceptance.mean_length
    assert values[prefix + "draft_tokens",] == machine.chosen[-1]
    for place, number in enumerate(acceptance.by_position, start=1):
        assert values[prefix + "accepted_at_position_tokens_total", str(place)] == number


def test_drafts_are_tried_early_however_slow_a_step_is():
    machine = Machine(lambda num_rows, num_drafts: 3.0 + 0.1 * num_drafts, 0.95)
    machine.run(40, 1)
    assert usual(machine.chosen[20:]) > 0
