"""Around the simulator: devices fitted to steps, what parts take of a core, sizes compared, pages drawn."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from loadtest.paced import TextDevice
from loadtest.simulator import drawn
from loadtest.simulator.costs import NOTHING, Costs
from loadtest.simulator.figures import Slo, figures, quantile
from loadtest.simulator.fleet import FleetOptions
from loadtest.simulator.runs import run
from loadtest.simulator.samples import StepSample, fit
from loadtest.simulator.sweep import Sweep, at_size, cost
from loadtest.simulator.visit import visit_of
from loadtest.simulator.workload import Lengths, day, steady
from serve.options import AutoscalingOptions

DEVICE = TextDevice(base_s=0.020, row_s=0.001, unit_s=0.0001, kv_cache_tokens=32_768, max_num_seqs=16)
SHORT = Lengths(prompt_median=100, output_median=15, sigma=0.5, most_prompt=400, most_output=60)
SWEEP = Sweep(
    device=DEVICE, lengths=SHORT, costs=Costs(), slo=Slo(), rate=4.0, warm_s=5.0, seconds=10.0, replicas_per_gateway=2
)


def samples(base_s: float, row_s: float, unit_s: float, context_s: float) -> list[StepSample]:
    source = random.Random(0)
    made = []
    for _ in range(300):
        rows, further = source.randint(1, 30), source.choice([0, 0, 0, 100, 500])
        context = rows * source.randint(10, 1000) + further
        seconds = base_s + row_s * rows + unit_s * further + context_s * context
        made.append(StepSample(rows, further, context, seconds))
    return made


def test_a_fit_finds_the_device_that_took_the_steps():
    fitted = fit(samples(0.02, 0.0003, 0.0001, 2e-7), DEVICE)
    found = fitted.device
    assert [found.base_s, found.row_s, found.unit_s, found.context_s] == pytest.approx([0.02, 0.0003, 0.0001, 2e-7])
    assert fitted.error_of_step == pytest.approx(0.0, abs=1e-9) and found.max_num_seqs == 16


def test_a_fit_gives_nothing_a_negative_cost():
    assert fit(samples(0.02, 0.0003, 0.0001, -1e-8), DEVICE).device.context_s == 0.0


def test_a_step_that_was_held_up_changes_no_fit():
    steps = samples(0.02, 0.0003, 0.0001, 0.0)
    steps[7] = replace(steps[7], seconds=3.0)
    assert fit(steps, DEVICE).device.base_s == pytest.approx(0.02, rel=1e-6)


def test_shares_of_a_core_add_up_by_hand():
    costs = replace(
        NOTHING,
        request_s=0.002,
        token_s=1e-5,
        listed_s=1e-7,
        candidate_s=1e-6,
        block_s=1e-6,
        report_s=1e-5,
        push_s=1e-4,
    )
    loads = costs.loads(
        num_replicas=100, num_gateways=4, num_drawn=32, requests_per_s=400, tokens_per_s=40_000, num_prompt=1600
    )
    assert loads["gateway: requests"] == pytest.approx(0.2)
    assert loads["gateway: ranking"] == pytest.approx(100 * (100e-7 + 32e-6 + 100e-6))
    assert loads["gateway: tokens"] == pytest.approx(0.1)
    assert loads["gateway: load reports"] == pytest.approx(100 * 10 * 1e-5)
    assert loads["hub: pushes"] == pytest.approx(104 * 1e-4)
    told = replace(NOTHING, change_s=1e-4, follower_s=1e-5, update_s=1e-6)
    assert told.announce_s(4) == pytest.approx(1e-4 + 4e-5)
    assert told.adopt_s(1000) == pytest.approx(1e-3)


def test_a_gateway_that_ranks_a_few_draws_others_each_time():
    sampled = replace(SWEEP, num_drawn=2)
    done, row = at_size(sampled, 8)
    assert len({visit.replica_id for visit in done.visits}) == 8 and row["attainment"] > 0.99
    assert row["loads"]["gateway: ranking"] < at_size(SWEEP, 8)[1]["loads"]["gateway: ranking"]


def test_figures_count_what_arrived_and_what_ended_in_the_window():
    early, late, refused = visit_of(0, 0.0, 10, 3), visit_of(1, 5.0, 10, 3), visit_of(2, 6.0, 10, 3)
    early.first(1.0), early.end(6.0)
    late.first(8.0), late.end(8.1)
    refused.refuse(6.0)
    told = figures([early, late, refused], begin_s=5.0, end_s=10.0, slo=Slo(ttft_s=2.0, tpot_s=0.1))
    assert (told.requests, told.completed, told.refused) == (2, 1, 1)
    assert told.requests_per_s == pytest.approx(2 / 5) and told.tokens_per_s == pytest.approx(6 / 5)
    assert told.ttft_p50_s == pytest.approx(3.0) and told.attainment == 0.0
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0 and quantile([], 0.5) == 0.0


def test_a_gateway_that_is_full_costs_goodput_and_more_gateways_bring_it_back():
    slow = replace(SWEEP, costs=replace(Costs(), request_s=0.04))
    _, one = at_size(replace(slow, replicas_per_gateway=None), 8)
    _, four = at_size(slow, 8)
    assert one["first"] == "gateway: requests" and one["gateway_busiest"] > 0.9
    assert one["goodput_per_s"] < 0.8 * four["goodput_per_s"] and four["attainment"] > 0.99
    assert cost(8, four["goodput_per_s"]) == four["replica_hours_per_1000_good"]


def test_charts_of_sizes_and_of_a_day_are_whole():
    rows = {"one": [at_size(SWEEP, num)[1] for num in (2, 4)]}
    scaling = AutoscalingOptions(max_replicas=4, downscale_delay_s=5.0)
    plans = {
        "autoscaling": FleetOptions(device=DEVICE, num_replicas=1, autoscaling=scaling, load_s=5.0),
        "2 fixed": FleetOptions(device=DEVICE, num_replicas=2),
    }
    end_s = 60.0
    runs = {
        name: run(steady(4.0, end_s, SHORT), options, begin_s=0.0, end_s=end_s, slo=Slo())
        for name, options in plans.items()
    }
    assert runs["2 fixed"].replica_hours == pytest.approx(2 * end_s / 3600)
    told = [
        {"fleet": name, "series": drawn.series(one, Slo(), end_s=end_s, begin_hour=0.0)} for name, one in runs.items()
    ]
    assert told[0]["series"]["ready"][0][1] == 1.0 and not told[1]["series"]["ready"]
    page = drawn.page("t", [*drawn.scale(rows, Slo()), *drawn.day(told)])
    found = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(found) == 5 + 4
    for svg in found:
        ElementTree.fromstring(svg)


def test_a_day_at_a_tenth_of_the_rate_has_a_tenth_of_the_requests():
    many, few = (sum(1 for _ in day(rate, SHORT, begin_s=36_000, end_s=43_200)) for rate in (1.0, 0.1))
    assert few == pytest.approx(many / 10, rel=0.15)
