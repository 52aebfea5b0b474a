"""A simulated gateway: the router that serves, in front of one core that everything else takes its time from."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Sequence

from loadtest.simulator.costs import Costs
from loadtest.simulator.replica import Replica
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World
from serve.errors import Overloaded
from serve.gateway.routing import Router


class SimulatedGateway:
    """Requests and tokens wait for its core in order of arrival; load reports make it slower throughout."""

    def __init__(self, number: int, world: World, router: Router, costs: Costs, num_ranked: int | None = None):
        """`num_ranked`: replicas that the router looks at, drawn at random; None: all."""
        self.number = number
        self.busy_s = 0.0
        self.num_held = 0
        """Requests that wait for a first replica."""
        self._world = world
        self._router = router
        self._costs = costs
        self._num_ranked = num_ranked or 1 << 30
        self._random = random.Random(f"gateway-{number}")
        self._free_s = 0.0
        """When the core has done what is asked of it so far."""
        self._held: deque[Visit] = deque()
        self._sent: dict[str, deque[tuple[float, str]]] = defaultdict(deque)
        """By replica: what was sent there and may not be in its reports yet."""

    def arrive(self, visit: Visit, replicas: Sequence[Replica]) -> None:
        """`replicas` may change until it is placed."""
        costs = self._costs
        seconds = costs.request_s + costs.rank_s(min(len(replicas), self._num_ranked), visit.num_prompt)
        self._world.at(self._work(seconds, len(replicas)), lambda: self._place(visit, replicas))

    def deliver(self, visit: Visit, num_tokens: int, is_last: bool, num_replicas: int) -> None:
        """Tokens of a replica, on their way to the client."""
        done = self._work(num_tokens * self._costs.token_s, num_replicas)
        if num_tokens:
            visit.first(done)
        if is_last:
            visit.end(done)

    def joined(self, replicas: Sequence[Replica]) -> None:
        """A replica has come: those that were held go on."""
        held, self._held, self.num_held = self._held, deque(), 0
        for visit in held:
            self._place(visit, replicas)

    def left(self, replica_id: str) -> None:
        self._router.forget(replica_id)
        self._sent.pop(replica_id, None)

    def _place(self, visit: Visit, replicas: Sequence[Replica]) -> None:
        if not replicas:
            self._held.append(visit)
            self.num_held = len(self._held)
            return
        if len(replicas) > self._num_ranked:
            replicas = self._random.sample(replicas, self._num_ranked)
        able = {replica.replica_id: replica for replica in replicas}
        candidates = [replica.candidate(self._unreported(replica)) for replica in replicas]
        for prediction in self._router.rank(visit.request, candidates):
            self._router.record(visit.request, prediction)
            try:
                able[prediction.replica_id].submit(visit)
            except Overloaded:
                continue
            visit.gateway, visit.replica_id = self.number, prediction.replica_id
            self._sent[prediction.replica_id].append((self._world.now, visit.request.request_id))
            return
        visit.refuse(self._world.now)

    def _unreported(self, replica: Replica) -> list[str]:
        replica.before_change()
        sent = self._sent.get(replica.replica_id)
        if not sent:
            return []
        while sent and sent[0][0] <= replica.reports.taken_s:
            sent.popleft()
        return [request_id for _, request_id in sent]

    def _work(self, seconds: float, num_replicas: int) -> float:
        """When the core will have done that too."""
        if not seconds:
            return self._world.now
        share = min(0.95, self._costs.reports_share(num_replicas))
        self.busy_s += seconds
        self._free_s = max(self._free_s, self._world.now) + seconds / (1 - share)
        return self._free_s
