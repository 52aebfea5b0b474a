"""A worker of a few collectives, for tests of the group itself: what it does is in the message."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist

from serve.errors import ConfigError
from serve.ranks.group import RankGroup
from serve.ranks.spec import PeerSpec

WORKER = "ranks_worker:CollectiveWorker"


class CollectiveWorker:
    """`sums` all-reduces ones, `raises` fails on the rank it names."""

    def __init__(self, spec: PeerSpec) -> None:
        self.rank = spec.rank
        self.seen: list[tuple[int, int]] = []

    def load(self, fails: int | None = None) -> dict[str, int]:
        if fails == self.rank:
            raise ConfigError(f"rank {self.rank} finds no weights; give it some", param="model")
        return {"rank": self.rank, "pid": os.getpid(), "threads": torch.get_num_threads()}

    def told(self) -> dict[str, Any]:
        """(number, bytes) of every message, in order."""
        return {"told": self.seen}

    def run(self, payload: memoryview) -> None:
        step = json.loads(bytes(payload))
        self.seen.append((step.get("number", 0), len(payload)))
        if step.get("raises") == self.rank:
            raise ValueError(f"these are the words of rank {self.rank}")
        if step.get("sums"):
            dist.all_reduce(torch.ones(1))


def message(*, size: int = 0, **step: Any) -> bytes:
    """What `CollectiveWorker.run` reads, filled up to `size` bytes."""
    return json.dumps(step).encode().ljust(size)


def sum_here() -> float:
    """The driver's part of `sums`."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return ones.item()


def drive_until_killed() -> None:
    """A driver of two peers which says who they are, leaves them in a collective, and waits for its own end."""
    group = RankGroup.start(WORKER, ["cpu"] * 3)
    pids = [answer["pid"] for answer in group.call("load")]
    group.tell(message(sums=True))
    print(json.dumps({"pids": pids, "directory": str(group.directory)}), flush=True)
    input()
