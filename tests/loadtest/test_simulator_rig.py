"""What the simulator is calibrated against: real processes answer, every step is written down, and nothing stays."""

from __future__ import annotations

import asyncio

import psutil

from loadtest.paced import TextDevice
from loadtest.simulator.calibrate import prompts, simulate
from loadtest.simulator.costs import Costs
from loadtest.simulator.rig import rig
from loadtest.simulator.workload import Lengths

DEVICE = TextDevice(base_s=0.002, row_s=0.0, unit_s=0.0, kv_cache_tokens=65_536)
SHORT = Lengths(prompt_median=40, output_median=6, most_output=12)


def test_measured_and_simulated_requests_are_the_same_ones():
    visits = prompts(20.0, 0.5, SHORT, seed=1)

    async def scenario():
        async with rig(num_replicas=2, num_gateways=1, device=DEVICE) as running:
            await running.ask(visits)
            assert running.gateway_cpu_s() > 0
        return running.samples

    before = set(psutil.Process().children(recursive=True))
    samples = asyncio.run(asyncio.wait_for(scenario(), 120))
    assert set(psutil.Process().children(recursive=True)) <= before
    assert all(visit.num_ends == 1 and visit.first_s is not None for visit in visits)
    computed = sum(sample.num_rows + sample.num_further for replica in samples for sample in replica)
    assert computed == sum(visit.num_prompt + visit.num_output - 1 for visit in visits)
    simulated = simulate(visits, DEVICE, 2, Costs())
    assert [visit.request for visit in simulated] == sorted(
        (visit.request for visit in visits), key=lambda request: int(request.request_id.split("-")[1])
    )
