"""The simulator: equal to what a hand computes, the same for a seed, and nobody is lost in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.paced import TextDevice
from loadtest.simulator.coarse import CoarseReplica
from loadtest.simulator.costs import NOTHING
from loadtest.simulator.exact import ExactReplica
from loadtest.simulator.figures import Slo, figures
from loadtest.simulator.fleet import Fleet, FleetOptions
from loadtest.simulator.runs import run
from loadtest.simulator.visit import visit_of, visit_with
from loadtest.simulator.workload import DAY_S, Lengths, day, day_share, recorded, steady
from loadtest.simulator.world import World
from loadtest.traffic.traces import read_trace
from serve.options import AutoscalingOptions

DEVICE = TextDevice(base_s=0.020, row_s=0.001, unit_s=0.0001, kv_cache_tokens=32_768, max_num_seqs=8)
SHORT = Lengths(prompt_median=200, output_median=20, sigma=0.5, most_prompt=1000, most_output=100)
KINDS = (ExactReplica, CoarseReplica)
both = pytest.mark.parametrize("kind", KINDS)


def fleet(world: World, kind, num_replicas: int = 1, **options) -> Fleet:
    given = {"device": DEVICE, "costs": NOTHING} | options
    return Fleet(world, FleetOptions(num_replicas=num_replicas, kind=kind, **given))


def finish(kind, visits, **options) -> World:
    world = World()
    fleet(world, kind, **options).feed(visits)
    world.run()
    return world


@both
def test_one_request_takes_its_prefill_step_and_a_step_a_token(kind):
    visit = visit_of(0, 1.0, num_prompt=101, num_output=3)
    finish(kind, [visit])
    assert visit.first_s == pytest.approx(1.0 + 0.020 + 0.001 + 100 * 0.0001)
    assert visit.ended_s == pytest.approx(visit.first_s + 2 * 0.021)


@both
def test_a_newcomer_waits_for_the_step_under_way_and_then_shares_one_with_the_decode(kind):
    first, second = visit_of(0, 0.0, num_prompt=1, num_output=4), visit_of(1, 0.025, num_prompt=51, num_output=1)
    finish(kind, [first, second])
    assert first.first_s == pytest.approx(0.021)
    joint_s = 0.020 + 2 * 0.001 + 50 * 0.0001  # begins when the first one's second token is there
    assert second.ended_s == pytest.approx(0.042 + joint_s)
    assert first.ended_s == pytest.approx(0.042 + joint_s + 0.021)


@both
def test_a_prompt_larger_than_a_step_is_cut(kind):
    device = replace(DEVICE, max_num_batched_tokens=100)
    visit = visit_of(0, 0.0, num_prompt=150, num_output=1)
    finish(kind, [visit], device=device)
    assert visit.ended_s == pytest.approx(2 * 0.021 + (150 - 2) * 0.0001)


@both
def test_no_more_run_than_there_are_seats(kind):
    device = replace(DEVICE, max_num_seqs=1)
    visits = [visit_of(number, 0.0, num_prompt=1, num_output=2) for number in range(3)]
    finish(kind, visits, device=device)
    assert [visit.ended_s for visit in visits] == pytest.approx([0.042, 0.084, 0.126])


def test_a_gateway_has_one_core():
    costs = replace(NOTHING, request_s=0.010, token_s=0.001)
    visits = [visit_of(number, 0.0, num_prompt=1, num_output=1) for number in range(2)]
    finish(ExactReplica, visits, costs=costs)
    # Placed at 10 and 20 ms; the first's step ends at 31 ms, and the second's begins then and ends at 52 ms.
    assert [visit.ended_s for visit in visits] == pytest.approx([0.032, 0.053])


def test_load_reports_slow_a_gateway_down():
    costs = replace(NOTHING, request_s=0.010, report_s=0.05)  # ten a second: half of its core
    visit = visit_of(0, 0.0, num_prompt=1, num_output=1)
    finish(ExactReplica, [visit], costs=costs)
    assert visit.ended_s == pytest.approx(0.020 + 0.021)


@both
@pytest.mark.parametrize("autoscaling", [None, AutoscalingOptions(max_replicas=4, downscale_delay_s=5.0)])
def test_every_request_ends_exactly_once(kind, autoscaling):
    lengths = replace(SHORT, output_median=40)
    visits = [*steady(12.0, 40.0, lengths, seed=1)]
    options = FleetOptions(
        device=DEVICE, num_replicas=1, kind=kind, costs=NOTHING, num_gateways=3, autoscaling=autoscaling, load_s=2.0
    )
    outcome = run(visits, options, begin_s=0.0, end_s=40.0, slo=Slo())
    assert outcome.visits == visits
    assert {visit.num_ends for visit in visits} == {1}
    assert outcome.figures.completed + outcome.figures.refused == len(visits)
    if autoscaling is not None:
        assert max(moment.num_ready for moment in outcome.moments) > 1


@both
def test_what_nobody_has_room_for_is_refused_and_counted(kind, monkeypatch):
    monkeypatch.setattr(kind, "max_waiting", 2)
    visits = [visit_of(number, 0.0, num_prompt=1, num_output=50) for number in range(30)]
    finish(kind, visits, num_replicas=2)
    assert {visit.num_ends for visit in visits} == {1}
    assert 0 < sum(visit.is_refused for visit in visits) < 30


@both
def test_a_seed_gives_the_same_run_again(kind):
    def rows() -> list[tuple]:
        visits = [*steady(8.0, 20.0, SHORT, seed=3)]
        finish(kind, visits, num_replicas=3, num_gateways=2)
        return [(visit.first_s, visit.ended_s, visit.replica_id) for visit in visits]

    assert rows() == rows()


def test_skipping_equal_steps_changes_little():
    def outcome(kind):
        visits = [*steady(15.0, 60.0, SHORT, seed=2)]
        finish(kind, visits, num_replicas=2)
        return figures(visits, begin_s=10.0, end_s=60.0, slo=Slo())

    exact, coarse = (outcome(kind) for kind in KINDS)
    assert coarse.tokens_per_s == pytest.approx(exact.tokens_per_s, rel=0.02)
    assert coarse.tpot_p50_s == pytest.approx(exact.tpot_p50_s, rel=0.05)
    assert coarse.ttft_p50_s == pytest.approx(exact.ttft_p50_s, rel=0.1)


def test_prompts_with_a_common_beginning_are_found_cached():
    prompt = tuple(range(400))
    visits = [visit_with(f"r{number}", 2.0 * number, prompt, 2) for number in range(4)]
    finish(ExactReplica, visits, num_replicas=2)
    assert [visit.num_cached for visit in visits] == [0, 384, 384, 384]
    assert len({visit.replica_id for visit in visits}) == 1


def test_a_fleet_of_none_starts_one_for_a_request_and_goes_back_to_none():
    world = World()
    scaling = AutoscalingOptions(min_replicas=0, max_replicas=2, downscale_to_zero_delay_s=30.0)
    small = fleet(world, CoarseReplica, 0, autoscaling=scaling, load_s=20.0)
    visit = visit_of(0, 7.0, num_prompt=1, num_output=2)
    small.feed([visit])
    world.run(300.0)
    assert visit.first_s == pytest.approx(10.0 + 20.0 + 0.021)  # decided at 10 s
    assert not small.ready and small.settle_bill() < 100.0
    small.close()
    world.run()


def test_the_day_has_its_peak_at_eleven_and_a_trace_keeps_its_times():
    assert day_share(11 * 3600) == 1.0 == max(day_share(hour * 3600) for hour in range(24))
    visits = [*day(0.02, SHORT, seed=0)]
    assert all(0 <= visit.arrived_s < DAY_S for visit in visits) and len(visits) > 500
    arrivals = read_trace("azure")
    replayed = [*recorded(arrivals, speed=2.0)]
    assert [visit.arrived_s for visit in replayed] == [arrival.at_s / 2 for arrival in arrivals]
