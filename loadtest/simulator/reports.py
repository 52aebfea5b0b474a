"""What gateways know of a replica: its state at its last report, `LOAD_PERIOD_S` ago at most.

Reports are not events here (a thousand replicas send ten thousand a second): who changes or reads a replica first takes
the report that has come due since.
"""

from __future__ import annotations

import math

from loadtest.simulator.world import World
from serve.backend import Load
from serve.channel_server import LOAD_PERIOD_S
from serve.prefix_view import PrefixView
from serve.text.prefix_digest import PrefixDigest


class Reports:
    """Of one replica. `load` and `digest` are asked when a report is due."""

    def __init__(self, world: World, number: int):
        self._world = world
        self._phase_s = LOAD_PERIOD_S * (number * 0.618 % 1)  # they do not report together
        self._tick = -1
        self.load = Load()
        self.prefixes = PrefixView()
        self._mark: int | None = None

    def is_due(self) -> bool:
        return self._due() > self._tick

    def take(self, load: Load, digest: PrefixDigest | None) -> None:
        """The replica's state as of now, which has not changed since the report was due."""
        self._tick = self._due()
        self.load = load
        if digest is not None and (change := digest.since(self._mark)) is not None:
            self._mark = change.mark
            self.prefixes.change(
                digest.block_size, is_whole=change.is_whole, added=change.added, removed=change.removed
            )

    @property
    def taken_s(self) -> float:
        """When the last one left."""
        return self._phase_s + self._tick * LOAD_PERIOD_S

    def _due(self) -> int:
        return math.floor((self._world.now - self._phase_s) / LOAD_PERIOD_S)
