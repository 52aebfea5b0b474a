"""Puts the ranks of a text model together: starts peers, has all load at once, sizes the cache by the smallest rank.

The driver is the first rank of the last stage, which has the logits. What it drafts with is its own and whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.parallel import Place
from models.text.base import CausalLM
from serve.compute import choose_device
from serve.errors import ConfigError
from serve.options import ModelOptions
from serve.ranks.group import RankGroup, Replies
from serve.ranks.launch import Launcher, LocalLauncher
from serve.ranks.spec import WORKERS
from serve.request import RankCard
from serve.text.load import held_by

_FOR_PEERS = (
    "model",
    "device",
    "dtype",
    "load_format",
    "threads",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
)


def driver_rank(options: ModelOptions) -> int:
    return (options.pipeline_parallel_size - 1) * options.tensor_parallel_size


def start_group(options: ModelOptions, threads: int, launcher: Launcher | None = None) -> RankGroup:
    """The peers' processes, before they load. `threads`: of each, unless the model turns out to be small.

    Raises ConfigError, also what a peer raised, and EngineDead.
    """
    device, num_ranks = choose_device(options), options.num_ranks
    if device.type == "cuda" and launcher is None and torch.cuda.device_count() < num_ranks:
        raise ConfigError(
            f"tensor_parallel_size {options.tensor_parallel_size} times pipeline_parallel_size "
            f"{options.pipeline_parallel_size} takes {num_ranks} devices, but this machine shows "
            f"{torch.cuda.device_count()}; lower them",
            param="tensor_parallel_size",
        )
    launcher = launcher or LocalLauncher()
    devices = launcher.devices(device.type, num_ranks)
    return RankGroup.start(
        WORKERS["text"], devices, driver_rank=driver_rank(options), threads=threads, launcher=launcher
    )


@dataclass(slots=True)
class Ranks:
    """The ranks of one model while it is built. Use: `begin`, load the driver's part, `loaded`, `fit`, `cards`."""

    group: RankGroup
    place: Place
    """The driver's."""
    _replies: Replies
    _held: dict[int, dict[str, Any]] = field(default_factory=dict)
    _room: dict[int, int] = field(default_factory=dict)
    """Blocks that each rank has memory for."""

    @classmethod
    def begin(cls, group: RankGroup, options: ModelOptions, folder: Path) -> Ranks:
        """Have the peers load, and join with them the groups of the split. Raises what ended the group."""
        chosen = {name: getattr(options, name) for name in _FOR_PEERS}
        replies = group.begin("load", folder=str(folder), options=chosen)
        size, stages = options.tensor_parallel_size, options.pipeline_parallel_size
        try:
            place = Place.join(group.driver_rank, tensor_size=size, num_stages=stages)
        except RuntimeError as error:
            raise group.explain(error) from error
        return cls(group, place, replies)

    def loaded(self, model: CausalLM, device: torch.device) -> None:
        """Wait for the peers; `model` is the driver's part. Raises ConfigError when a peer did."""
        self._held = self._by_rank(held_by(model, device), self._replies.wait())

    def fit(self, measure: Callable[[], int], max_num_tokens: int, num_replicas_here: int) -> int:
        """Blocks that every rank has memory for; `measure` says how many the driver has. All measure together."""
        replies = self.group.begin("size", max_num_tokens=max_num_tokens, num_replicas_here=num_replicas_here)
        try:
            own = measure()
        except RuntimeError as error:
            raise self.group.explain(error) from error
        by_rank = self._by_rank({"num_blocks": own}, replies.wait())
        self._room = {rank: reply["num_blocks"] for rank, reply in by_rank.items()}
        return min(self._room.values())

    def cards(self, block_size: int) -> tuple[RankCard, ...]:
        return tuple(
            RankCard(rank=rank, kv_cache_tokens=self._room[rank] * block_size, **held)
            for rank, held in sorted(self._held.items())
        )

    def _by_rank(self, own: dict[str, Any], replies: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        return {self.group.driver_rank: own, **dict(zip(self.group.peer_ranks, replies))}
