"""The simulator beside what it simulates: the same requests at the same times, measured and in virtual time.

A device is fitted to the steps of the first measured run; that run and the others are then predicted from it. What is
compared is what clients saw. The replicas of several are paced, because shared cores do not add up; a real engine is
compared as a single replica.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.paced import TextDevice
from loadtest.simulator.costs import Costs
from loadtest.simulator.exact import ExactReplica
from loadtest.simulator.figures import Figures, Slo, figures
from loadtest.simulator.fleet import FleetOptions
from loadtest.simulator.rig import rig
from loadtest.simulator.runs import run
from loadtest.simulator.samples import Fit, StepSample, fit
from loadtest.simulator.visit import Visit, visit_with
from loadtest.simulator.workload import Lengths

COMPARED = ("tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
WARM_S = 4.0
"""Of the same traffic before what is measured: paces then know their devices, as they do in the simulator."""
FIRST_ID, LAST_ID = 300, 1000
"""Of prompts' random tokens: ordinary ones of the embedded model's vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One run twice."""

    num_replicas: int
    measured: Figures
    simulated: Figures
    gateway_cores: float
    """Measured, of all gateway processes."""

    def errors(self) -> dict[str, float]:
        """Simulated over measured, less one."""
        return {
            name: getattr(self.simulated, name) / getattr(self.measured, name) - 1
            for name in COMPARED
            if getattr(self.measured, name)
        }

    def rows(self) -> list[dict[str, Any]]:
        both = (("measured", self.measured), ("simulated", self.simulated))
        rows = [
            {"replicas": self.num_replicas, "run": name, "requests": told.requests}
            | {field: getattr(told, field) for field in COMPARED}
            for name, told in both
        ]
        return [*rows, {"replicas": self.num_replicas, "run": "error", **self.errors()}]


async def measure(
    visits: Sequence[Visit], warm: Sequence[Visit], *, num_replicas: int, device: TextDevice | None, model: str
) -> tuple[list[StepSample], float]:
    """Let real processes answer `visits`, which take in what their clients saw; the steps of all replicas, and how many
    cores the gateway took."""
    async with rig(num_replicas=num_replicas, device=device, model=model) as running:
        await running.ask(warm)
        before = running.gateway_cpu_s()
        await running.ask(visits)
        cpu_s = running.gateway_cpu_s() - before
    return [sample for samples in running.samples for sample in samples], cpu_s / _end_s(visits)


def prompts(rate: float, seconds: float, lengths: Lengths, *, seed: int) -> list[Visit]:
    """Poisson arrivals of prompts of random tokens: the same for a seed, and none is another's beginning."""
    source, at, visits = random.Random(f"calibrate-{seed}"), 0.0, list[Visit]()
    while (at := at + source.expovariate(rate)) < seconds:
        num_prompt, num_output = lengths.draw(source)
        ids = tuple(source.randrange(FIRST_ID, LAST_ID) for _ in range(num_prompt))
        visits.append(visit_with(f"c{seed}-{len(visits)}", at, ids, num_output))
    return visits


def again(visits: Sequence[Visit]) -> list[Visit]:
    """The same requests at the times at which they were sent, as if nobody had answered yet."""
    return [Visit(visit.request, visit.num_output, visit.arrived_s) for visit in visits]


def simulate(visits: Sequence[Visit], device: TextDevice, num_replicas: int, costs: Costs) -> list[Visit]:
    """Step by step, every replica as the device that was fitted."""
    asked = sorted(again(visits), key=lambda visit: visit.arrived_s)
    options = FleetOptions(device=device, num_replicas=num_replicas, costs=costs, kind=ExactReplica)
    return run(asked, options, begin_s=0.0, end_s=asked[-1].arrived_s + 1e-6, slo=Slo()).visits


async def compare(
    fitted: Fit | None,
    *,
    num_replicas: int,
    rate: float,
    seconds: float,
    lengths: Lengths,
    costs: Costs,
    like: TextDevice,
    paced: bool,
    model: str,
    seed: int,
) -> tuple[Fit, Comparison]:
    """Measure, fit where nothing is fitted yet, simulate. `rate`: a replica's share."""
    warm, visits = (
        prompts(rate * num_replicas, span_s, lengths, seed=number) for number, span_s in ((-1, WARM_S), (seed, seconds))
    )
    samples, cores = await measure(visits, warm, num_replicas=num_replicas, device=like if paced else None, model=model)
    fitted = fitted or fit(samples, like)
    simulated = simulate(visits, fitted.device, num_replicas, costs)
    told = [figures(each, begin_s=0.0, end_s=_end_s(each) + 1e-6, slo=Slo()) for each in (visits, simulated)]
    return fitted, Comparison(num_replicas=num_replicas, measured=told[0], simulated=told[1], gateway_cores=cores)


def _end_s(visits: Sequence[Visit]) -> float:
    """When the last answer was complete."""
    return max(visit.ended_s or 0.0 for visit in visits)
