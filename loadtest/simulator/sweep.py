"""Fleets of several sizes under a load that grows with them: goodput, cost, and what is busy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.paced import TextDevice
from loadtest.simulator.costs import Costs
from loadtest.simulator.figures import Slo
from loadtest.simulator.fleet import FleetOptions
from loadtest.simulator.runs import Run, run
from loadtest.simulator.workload import Lengths, steady
from serve.gateway.shortlist import NUM_DRAWN


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What is the same for all sizes."""

    device: TextDevice
    lengths: Lengths
    costs: Costs
    slo: Slo
    rate: float
    """Requests a second for each replica."""
    warm_s: float
    seconds: float
    replicas_per_gateway: float | None
    """None: one gateway for all."""
    num_drawn: int = NUM_DRAWN
    seed: int = 0


def at_size(sweep: Sweep, num_replicas: int) -> tuple[Run, dict[str, Any]]:
    """A run, and its row of the table."""
    share = sweep.replicas_per_gateway
    num_gateways = 1 if share is None else max(1, round(num_replicas / share))
    options = FleetOptions(
        device=sweep.device,
        num_replicas=num_replicas,
        num_gateways=num_gateways,
        costs=sweep.costs,
        num_drawn=sweep.num_drawn,
    )
    end_s = sweep.warm_s + sweep.seconds
    done = run(
        steady(sweep.rate * num_replicas, end_s, sweep.lengths, seed=sweep.seed),
        options,
        begin_s=sweep.warm_s,
        end_s=end_s,
        slo=sweep.slo,
        seed=sweep.seed,
    )
    figures = done.figures
    loads = sweep.costs.loads(
        num_replicas=num_replicas,
        num_gateways=num_gateways,
        num_drawn=sweep.num_drawn,
        requests_per_s=sweep.rate * num_replicas,
        tokens_per_s=sweep.rate * num_replicas * sweep.lengths.output_mean,
        num_prompt=sweep.lengths.prompt_mean,
    )
    device, lengths = sweep.device, sweep.lengths
    work_s = lengths.prompt_mean * device.unit_s + lengths.output_mean * device.row_s
    loads |= {"replica: work": sweep.rate * work_s}  # as the autoscaling rule counts it
    row = {
        "replicas": num_replicas,
        "gateways": num_gateways,
        "requests_per_s": figures.requests_per_s,
        "tokens_per_s": figures.tokens_per_s,
        "ttft_p50_s": figures.ttft_p50_s,
        "ttft_p99_s": figures.ttft_p99_s,
        "tpot_p99_s": figures.tpot_p99_s,
        "attainment": figures.attainment,
        "goodput_per_s": figures.goodput_per_s,
        "replica_hours_per_1000_good": cost(num_replicas, figures.goodput_per_s),
        "gateway_busiest": done.busiest["gateway"],
        "loads": loads,
        "first": max(loads, key=lambda name: loads[name]),
        "announce_s": sweep.costs.announce_s(num_gateways),
        "adopt_s": sweep.costs.adopt_s(num_replicas),
    }
    return done, row


def cost(num_replicas: int, goodput_per_s: float) -> float:
    """Replica hours for a thousand requests that kept their SLO."""
    return num_replicas / 3.6 / goodput_per_s if goodput_per_s else float("inf")
