"""Whole runs: a fleet of a size at a rate, and a fleet through a day."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loadtest.simulator.figures import Figures, Slo, figures
from loadtest.simulator.fleet import Fleet, FleetOptions, Moment
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What came of it."""

    figures: Figures
    busiest: dict[str, float]
    """Share of a core: the busiest gateway; share of its time: the busiest and the average replica."""
    replica_hours: float
    moments: list[Moment]
    visits: list[Visit]


def run(
    visits: Iterable[Visit], options: FleetOptions, *, begin_s: float, end_s: float, slo: Slo, seed: int = 0
) -> Run:
    """Until all that arrived has ended; figures are of those that arrived from `begin_s` to `end_s`."""
    world, seen = World(), list[Visit]()
    fleet = Fleet(world, options, seed=seed)
    fleet.feed(_noted(visits, seen))
    world.run(begin_s)
    before = [gateway.busy_s for gateway in fleet.gateways], [replica.busy_s for replica in fleet.ready]
    world.run(end_s)
    seconds = end_s - begin_s
    gateways = [(gateway.busy_s - busy) / seconds for gateway, busy in zip(fleet.gateways, before[0])]
    replicas = [(replica.busy_s - busy) / seconds for replica, busy in zip(fleet.ready, before[1])]
    replica_s = fleet.settle_bill()
    fleet.close()
    world.run()
    return Run(
        figures=figures(seen, begin_s=begin_s, end_s=end_s, slo=slo),
        busiest={"gateway": max(gateways), "replica": max(replicas), "replicas": sum(replicas) / len(replicas)},
        replica_hours=replica_s / 3600,
        moments=fleet.moments,
        visits=seen,
    )


def _noted(visits: Iterable[Visit], seen: list[Visit]) -> Iterator[Visit]:
    for visit in visits:
        seen.append(visit)
        yield visit
