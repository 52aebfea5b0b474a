"""A worker of a few collectives, for tests of the group itself: what it does is in the message."""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist

from serve.errors import ConfigError
from serve.ranks.spec import PeerSpec


class CollectiveWorker:
    """Each message names a step: `sum` all-reduces ones; other steps fail or hang on the rank they name."""

    def __init__(self, spec: PeerSpec) -> None:
        self.rank = spec.rank
        self.seen: list[int] = []

    def load(self, *, fails: int | None = None) -> dict[str, int]:
        if fails == self.rank:
            raise ConfigError(f"rank {self.rank} finds no weights; give it some", param="model")
        return {"rank": self.rank, "pid": os.getpid(), "threads": torch.get_num_threads()}

    def num_seen(self) -> dict[str, list[int]]:
        return {"lengths": self.seen}

    def run(self, payload: memoryview) -> None:
        step = json.loads(bytes(payload).rstrip(b" "))
        self.seen.append(len(payload))
        if step.get("raises") == self.rank:
            raise ValueError(f"these are the words of rank {self.rank}")
        if step.get("sleeps_s"):
            time.sleep(step["sleeps_s"])
        if step.get("sums"):
            dist.all_reduce(torch.ones(4))
