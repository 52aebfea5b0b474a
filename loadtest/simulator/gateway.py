"""A simulated gateway: the router that serves, in front of one core that everything else takes its time from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain

from loadtest.simulator.costs import Costs
from loadtest.simulator.replica import Replica
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World
from serve.backend import Load
from serve.errors import Overloaded
from serve.gateway.routing import Router
from serve.prefix_view import PrefixView


class SimulatedGateway:
    """Requests and tokens wait for its core in order of arrival; load reports make it slower throughout."""

    def __init__(self, number: int, world: World, costs: Costs, num_drawn: int):
        """`num_drawn`: of the router."""
        self.number = number
        self.busy_s = 0.0
        self.num_held = 0
        """Requests that wait for a first replica."""
        self._world = world
        self._router = Router(seed=f"gateway-{number}", num_drawn=num_drawn, clock=lambda: world.now)
        self._costs = costs
        self._num_drawn = num_drawn
        self._free_s = 0.0
        """When the core has done what is asked of it so far."""
        self._held: deque[Visit] = deque()
        self._views: dict[str, _View] = {}
        """The replicas as it knows them."""

    def arrive(self, visit: Visit, replicas: Sequence[Replica]) -> None:
        """`replicas` may change until it is placed."""
        costs = self._costs
        seconds = costs.request_s + costs.rank_s(len(replicas), self._num_drawn, visit.num_prompt)
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
        self._views.pop(replica_id, None)

    def _place(self, visit: Visit, replicas: Sequence[Replica]) -> None:
        if not replicas:
            self._held.append(visit)
            self.num_held = len(self._held)
            return
        views = {replica.replica_id: self._view(replica) for replica in replicas}
        for prediction in chain.from_iterable(self._router.rounds(visit.request, views)):
            self._router.record(visit.request, prediction)
            view = views[prediction.replica_id]
            try:
                view.replica.submit(visit)
            except Overloaded:
                continue
            visit.gateway, visit.replica_id = self.number, prediction.replica_id
            view.sent.append((self._world.now, visit.request.request_id))
            return
        visit.refuse(self._world.now)

    def _view(self, replica: Replica) -> _View:
        if replica.replica_id not in self._views:
            self._views[replica.replica_id] = _View(replica)
        return self._views[replica.replica_id]

    def _work(self, seconds: float, num_replicas: int) -> float:
        """When the core will have done that too."""
        if not seconds:
            return self._world.now
        share = min(0.95, self._costs.reports_share(num_replicas))
        self.busy_s += seconds
        self._free_s = max(self._free_s, self._world.now) + seconds / (1 - share)
        return self._free_s


class _View:
    """A replica as one gateway knows it: a `Candidate`."""

    def __init__(self, replica: Replica):
        self.replica = replica
        self.sent: deque[tuple[float, str]] = deque()
        """When a request was sent, and its id; not in the reports yet, maybe."""

    @property
    def prefixes(self) -> PrefixView:
        return self.replica.reports.prefixes

    @property
    def unreported(self) -> list[str]:
        while self.sent and self.sent[0][0] <= self.replica.reports.taken_s:
            self.sent.popleft()
        return [request_id for _, request_id in self.sent]

    def load(self) -> Load:
        self.replica.before_change()
        return self.replica.reports.load
