"""A simulated replica as the fleet sees it. Two kinds: `exact.py` takes every step, `coarse.py` skips equal ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from loadtest.paced import TextDevice
from loadtest.simulator.reports import Reports
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World
from serve.backend import Load
from serve.errors import Overloaded
from serve.text.pace import TextPace
from serve.text.prefix_digest import PrefixDigest
from serve.text.sequence import TokenBatch

Deliver = Callable[[Visit, int, bool], None]
"""(visit, new tokens, whether they are the last): leave for the gateway now."""


@dataclass(slots=True)
class StepRow:
    """What a pace looks at of a row, and, below, of a batch."""

    token_ids: range


@dataclass(slots=True)
class Step:
    rows: list[StepRow]


ROW = StepRow(range(1))


class Replica(ABC):
    """Accepts visits, computes them in virtual time, reports."""

    max_waiting = 1024

    def __init__(self, replica_id: str, number: int, world: World, device: TextDevice, deliver: Deliver):
        self.replica_id = replica_id
        self.world = world
        self.device = device
        self.deliver = deliver
        self.reports = Reports(world, number)
        self.is_draining = False
        self.busy_s = 0.0
        """Time in steps so far."""
        self.refused_s = 0.0
        """Predicted cost of what it has refused."""

    def submit(self, visit: Visit) -> None:
        """Raises Overloaded."""
        self.before_change()
        try:
            self.accept(visit)
        except Overloaded:
            self.refused_s += self.cost_s(visit)
            raise

    def before_change(self) -> None:
        """Whatever changes the state calls this first: a report that has come due is of the state before."""
        if self.reports.is_due():
            self.reports.take(self.load(), self.digest())

    def warm_up(self) -> None:
        """Let its pace know the device, as it does after a minute of service: some decode steps, and a prompt."""
        for num_rows in (1, 2, 4, 8, 16, 32) * 16:
            batch = Step([ROW] * num_rows)
            self.pace.on_step(cast(TokenBatch, batch), self.device.step_s(num_rows, 0))
        for num_further in (255, 511, 1023) * 2:
            self.pace.on_step(
                cast(TokenBatch, Step([StepRow(range(num_further + 1))])), self.device.step_s(1, num_further)
            )

    @property
    @abstractmethod
    def pace(self) -> TextPace:
        """What it predicts with."""

    @property
    @abstractmethod
    def num_jobs(self) -> int: ...

    @abstractmethod
    def load(self) -> Load: ...

    @abstractmethod
    def digest(self) -> PrefixDigest | None: ...

    @abstractmethod
    def cost_s(self, visit: Visit) -> float:
        """What it adds to the backlog, as a replica predicts it."""

    @abstractmethod
    def accept(self, visit: Visit) -> None: ...
