"""What a peer is told, and what it runs.

A *rank* is one process with one device. The *driver* is the rank in the replica's own process, which schedules and
samples; the other ranks are *peers*, each of which mirrors the driver's model calls in a `Worker` of its own.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerSpec:
    """One peer's place in its group. Travels as JSON, and as it has a secret never on a command line."""

    worker: str
    """`module:Class` of its `Worker`; see `WORKERS`."""
    rank: int
    world_size: int
    driver_rank: int
    device: str
    """`cpu` or `cuda:i`."""
    threads: int
    """Compute threads of this rank."""
    address: str
    """Where the driver listens: `unix:PATH`, or `tcp:HOST:PORT` from another node."""
    secret: str
    """Hex. Proves both sides to each other (`link.py`)."""
    store: str
    """Where torch.distributed meets: `file:PATH` on one node, `tcp:HOST:PORT` across nodes."""
    directory: str | None
    """Of socket and store while the group starts; None on another node than the driver's. Removed by a peer whose
    driver is gone."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> PeerSpec:
        return cls(**json.loads(text))


class Worker(Protocol):
    """A peer's part of the work: made as `Worker(spec)` when torch.distributed has been joined, used by one thread.

    `RankGroup.call("load", ...)` calls its method `load` with those arguments; such methods take and return what JSON
    holds. Whatever a worker raises ends its rank, and with it the group; a ConfigError keeps its text and its field.
    """

    def run(self, payload: memoryview) -> None:
        """Do what the driver's `RankGroup.tell(payload)` says. The memory is the driver's again after the return."""
        ...


WORKERS: dict[str, str] = {
    "text": "serve.text.rank_worker:TextWorker",
    "image": "serve.image.rank_worker:ImageWorker",
}
"""Kind of model → its worker, imported only in the peer: text and image never load each other."""
