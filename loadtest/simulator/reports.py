"""What gateways know of a replica: its state at its last report, `LOAD_PERIOD_S` ago at most.

Reports are not events here (a thousand replicas send ten thousand a second): who changes or reads a replica first takes
the report that has come due since.
"""

from __future__ import annotations

import math

from loadtest.simulator.world import World
from serve.backend import Load
from serve.channel_server import LOAD_PERIOD_S
from serve.gateway.routing import Candidate
from serve.prefix_view import PrefixView
from serve.text.prefix_digest import PrefixDigest


class Reports:
    """Of one replica. `load` and `digest` are asked when a report is due."""

    def __init__(self, replica_id: str, world: World, number: int):
        self._replica_id = replica_id
        self._world = world
        self._phase_s = LOAD_PERIOD_S * (number * 0.618 % 1)  # they do not report together
        self._tick = -1
        self._load = Load()
        self._view = PrefixView()
        self._mark: int | None = None
        self._candidate = Candidate(replica_id, self._load, self._view)

    def is_due(self) -> bool:
        return self._due() > self._tick

    def take(self, load: Load, digest: PrefixDigest | None) -> None:
        """The replica's state as of now, which has not changed since the report was due."""
        self._tick = self._due()
        self._load = load
        self._candidate = Candidate(self._replica_id, load, self._view)
        if digest is not None and (change := digest.since(self._mark)) is not None:
            self._mark = change.mark
            self._view.change(digest.block_size, is_whole=change.is_whole, added=change.added, removed=change.removed)

    @property
    def taken_s(self) -> float:
        """When the last one left."""
        return self._phase_s + self._tick * LOAD_PERIOD_S

    def candidate(self, unreported: list[str]) -> Candidate:
        if not unreported:
            return self._candidate
        return Candidate(self._replica_id, self._load, self._view, unreported)

    def _due(self) -> int:
        return math.floor((self._world.now - self._phase_s) / LOAD_PERIOD_S)
