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
from serve.text.peers import Peers

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


@dataclass(frozen=True, slots=True)
class Ranks:
    """The started processes of a model, and where the driver stands among them. Usable for one model after another."""

    group: RankGroup
    place: Place

    @classmethod
    def start(cls, options: ModelOptions, threads: int, launcher: Launcher | None = None) -> Ranks:
        """`threads`: of each peer, unless its model turns out to be small. `launcher` None: processes of this machine.

        Raises ConfigError, also what a peer raised, and EngineDead.
        """
        device, num_ranks = choose_device(options), options.num_ranks
        size, stages = options.tensor_parallel_size, options.pipeline_parallel_size
        if device.type == "cuda" and launcher is None and torch.cuda.device_count() < num_ranks:
            raise ConfigError(
                f"tensor_parallel_size {size} times pipeline_parallel_size {stages} takes {num_ranks} devices, but "
                f"this machine shows {torch.cuda.device_count()}; lower them",
                param="tensor_parallel_size",
            )
        launcher = launcher or LocalLauncher()
        devices, driver_rank = launcher.devices(device.type, num_ranks), (stages - 1) * size
        group = RankGroup.start(WORKERS["text"], devices, driver_rank=driver_rank, threads=threads, launcher=launcher)
        try:
            replies = group.begin("join", tensor_size=size, num_stages=stages)
            place = Place.join(driver_rank, tensor_size=size, num_stages=stages)
            replies.wait()
        except RuntimeError as error:
            group.close()
            raise group.explain(error) from error
        except BaseException:
            group.close()
            raise
        return cls(group, place)

    def close(self) -> None:
        """End the other ranks. Any number of times."""
        self.group.close()


@dataclass(slots=True)
class Loading:
    """One model on its way onto the ranks. Use: `begin`, load the driver's part, `loaded`, `fit`, `cards`."""

    ranks: Ranks
    _replies: Replies
    _held: dict[int, dict[str, Any]] = field(default_factory=dict)
    _room: dict[int, int] = field(default_factory=dict)
    """Blocks that each rank has memory for."""

    @classmethod
    def begin(cls, ranks: Ranks, options: ModelOptions, folder: Path) -> Loading:
        """Have the peers load. Raises what ended the group."""
        chosen = {name: getattr(options, name) for name in _FOR_PEERS}
        return cls(ranks, ranks.group.begin("load", folder=str(folder), options=chosen))

    def loaded(self, model: CausalLM, device: torch.device) -> None:
        """Wait for the peers; `model` is the driver's part. Raises ConfigError when a peer did."""
        self._held = self._by_rank(held_by(model, device), self._replies.wait())

    def fit(self, measure: Callable[[], int], max_num_tokens: int, num_replicas_here: int) -> int:
        """Blocks that every rank has memory for; `measure` says how many the driver has. All measure together."""
        replies = self.ranks.group.begin("size", max_num_tokens=max_num_tokens, num_replicas_here=num_replicas_here)
        try:
            own = measure()
        except RuntimeError as error:
            raise self.ranks.group.explain(error) from error
        by_rank = self._by_rank({"num_blocks": own}, replies.wait())
        self._room = {rank: reply["num_blocks"] for rank, reply in by_rank.items()}
        return min(self._room.values())

    def peers(self, options: ModelOptions) -> Peers:
        """For the runner."""
        seqs, size = options.max_num_seqs, options.block_size
        return Peers(self.ranks.group, self.ranks.place, max_num_seqs=seqs, block_size=size)

    def cards(self, block_size: int) -> tuple[RankCard, ...]:
        return tuple(
            RankCard(rank=rank, kv_cache_tokens=self._room[rank] * block_size, **held)
            for rank, held in sorted(self._held.items())
        )

    def _by_rank(self, own: dict[str, Any], replies: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        return {self.ranks.group.driver_rank: own, **dict(zip(self.ranks.group.peer_ranks, replies))}
