"""The whole: gateways, replicas that come and go, and the rule that decides how many."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from loadtest.paced import TextDevice
from loadtest.simulator.coarse import CoarseReplica
from loadtest.simulator.costs import Costs
from loadtest.simulator.gateway import SimulatedGateway
from loadtest.simulator.replica import Replica
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World
from serve.autoscaling import Autoscaler
from serve.demand import Demand
from serve.gateway.shortlist import NUM_DRAWN
from serve.options import AutoscalingOptions

SAMPLE_S = 1.0
"""Between two looks at the replicas' load; four times as often when serving, which at these scales is the same."""
DECIDE_S = 5.0
"""Between two decisions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetOptions:
    """What there is."""

    device: TextDevice
    num_replicas: int
    """At the start."""
    num_gateways: int = 1
    costs: Costs = field(default_factory=Costs)
    kind: type[Replica] = CoarseReplica
    num_drawn: int = NUM_DRAWN
    """Replicas that a gateway draws at random; of fewer it looks at all."""
    autoscaling: AutoscalingOptions | None = None
    load_s: float = 60.0
    """From the decision until a new replica takes requests."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The fleet at a time."""

    at_s: float
    num_ready: int
    num_wanted: int
    wait_s: float
    reason: str


class Fleet:
    """`arrive` takes visits; `replica_s` counts what was paid for, loading and draining included."""

    def __init__(self, world: World, options: FleetOptions, *, seed: int = 0):
        self.world = world
        self.options = options
        self.ready: list[Replica] = []
        self.moments: list[Moment] = []
        self.replica_s = 0.0
        self._is_closed = False
        self._draining: list[Replica] = []
        self._num_loading = 0
        self._num_made = 0
        self._paid_until_s = 0.0
        self._random = random.Random(f"gateways-{seed}")
        self.gateways = [
            SimulatedGateway(number, world, options.costs, options.num_drawn) for number in range(options.num_gateways)
        ]
        self._demand: dict[str, Demand] = {}
        for _ in range(options.num_replicas):
            self._join()
            self.ready[-1].warm_up()
        if options.autoscaling is not None:
            self._autoscaler = Autoscaler(options.autoscaling)
            world.at(SAMPLE_S, self._sample)
            world.at(DECIDE_S, self._decide)

    def feed(self, visits: Iterable[Visit]) -> None:
        """Visits in order of arrival, each announced by the one before it."""
        source = iter(visits)

        def arrive(visit: Visit) -> None:
            self.arrive(visit)
            if (following := next(source, None)) is not None:
                self.world.at(following.arrived_s, lambda: arrive(following))

        if (first := next(source, None)) is not None:
            self.world.at(first.arrived_s, lambda: arrive(first))

    def arrive(self, visit: Visit) -> None:
        gateway = self._random.randrange(len(self.gateways)) if len(self.gateways) > 1 else 0
        self.gateways[gateway].arrive(visit, self.ready)

    def close(self) -> None:
        """Nobody decides any more: what is under way ends, and the world with it."""
        self._is_closed = True

    def settle_bill(self) -> float:
        """Replica seconds until now."""
        self._pay()
        return self.replica_s

    @property
    def num_paid(self) -> int:
        return len(self.ready) + len(self._draining) + self._num_loading

    # -- replicas come and go --------------------------------------------------------------------------------------

    def _join(self) -> None:
        replica_id = f"replica-{self._num_made}"
        replica = self.options.kind(replica_id, self._num_made, self.world, self.options.device, self._deliver)
        self._num_made += 1
        if self.options.autoscaling is not None:
            self._demand[replica_id] = Demand(self.options.autoscaling, load_s=self.options.load_s)
        self.ready.append(replica)
        for gateway in self.gateways:
            gateway.joined(self.ready)

    def _start(self) -> None:
        self._pay()
        self._num_loading += 1

        def up() -> None:
            self._pay()
            self._num_loading -= 1
            self._join()

        self.world.at(self.world.now + self.options.load_s, up)

    def _stop(self) -> None:
        """The replica with the least to do takes nothing more."""
        self._pay()
        replica = min(self.ready, key=lambda replica: replica.num_jobs)
        self.ready.remove(replica)
        self._demand.pop(replica.replica_id, None)
        for gateway in self.gateways:
            gateway.left(replica.replica_id)
        if replica.num_jobs:
            replica.is_draining = True
            self._draining.append(replica)

    def _deliver(self, visit: Visit, num_tokens: int, is_last: bool) -> None:
        self.gateways[visit.gateway].deliver(visit, num_tokens, is_last, len(self.ready))
        if is_last and self._draining:
            self._pay()
            self._draining = [replica for replica in self._draining if replica.num_jobs]

    def _pay(self) -> None:
        self.replica_s += (self.world.now - self._paid_until_s) * self.num_paid
        self._paid_until_s = self.world.now

    # -- how many --------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        for replica in self.ready:
            self._demand[replica.replica_id].observe(replica.load(), self.world.now, refused_s=replica.refused_s)
        if not self._is_closed:
            self.world.at(self.world.now + SAMPLE_S, self._sample)

    def _decide(self) -> None:
        assert self.options.autoscaling is not None
        signals = [self._demand[replica.replica_id].signals() for replica in self.ready]
        num_target = len(self.ready) + self._num_loading
        decision = self._autoscaler.decide(
            signals,
            num_target=num_target,
            num_ready=len(self.ready),
            num_held=sum(gateway.num_held for gateway in self.gateways),
            now=self.world.now,
        )
        for _ in range(num_target, decision.num_replicas):
            self._start()
        for _ in range(decision.num_replicas, num_target):
            self._stop()
        wait_s = max((one.wait_s for one in signals), default=0.0)
        self.moments.append(Moment(self.world.now, len(self.ready), decision.num_replicas, wait_s, decision.reason))
        if not self._is_closed:
            self.world.at(self.world.now + DECIDE_S, self._decide)
