"""Ranks as Ray actors: each in a bundle of its own of the replica's placement group, the replica in the first.

The actor's process runs the very loop that a local peer runs (`serve/ranks/peer.py`), in a thread, so that the actor
still answers Ray. Ray places and kills; what ranks say to each other goes over their own connections: shared memory
beside the driver, TCP from other nodes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.deployments.node import node_address
from serve.logs import configure_logging
from serve.options import ModelOptions
from serve.ranks.launch import PeerProcess
from serve.ranks.peer import run
from serve.ranks.spec import PeerSpec


def bundles(model: ModelOptions) -> list[dict[str, float]]:
    """What a replica of `model` reserves: one bundle a rank, all alike."""
    bundle = {"CPU": float(model.num_cpus)}
    if model.gpus_per_rank:
        bundle["GPU"] = model.gpus_per_rank
    if model.accelerator_type is not None:
        bundle["accelerator_type:" + model.accelerator_type] = 0.001  # as Ray's own option asks for it
    return [bundle] * model.num_ranks


def by_node(nodes: Mapping[int, str]) -> list[int]:
    """Bundles, given the node of each, so that those of a node follow each other and the first stays the first.

    The driver has the first bundle. It is the first rank of the last stage, so ranks that follow it around the circle
    are its stage's, then those of the first stage, and so on: what sums at every layer shares a node, where it fits.
    """
    places = list(dict.fromkeys(nodes[bundle] for bundle in sorted(nodes)))
    return sorted(nodes, key=lambda bundle: (places.index(nodes[bundle]), bundle))


class PeerActor:
    """One peer. Its process ends with the peer's loop."""

    def __init__(self, rank: int) -> None:
        configure_logging(rank=rank)

    def pid(self) -> int:
        return os.getpid()

    def run(self, spec: str) -> None:
        """Returns never: the process ends."""
        threading.Thread(target=run, args=(PeerSpec.from_json(spec),), name="peer", daemon=True).start()
        threading.Event().wait()


class RayLauncher:
    """Peers as actors in the bundles after the first of this replica's placement group. Made in the replica's actor."""

    directory: str | None = None

    def __init__(self, model: ModelOptions) -> None:
        group = get_current_placement_group()
        assert group is not None, "a replica of several ranks has a placement group"
        self._group = group
        self._resources = bundles(model)[0]
        self._nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        self._order = by_node(self._nodes)
        self._own_node = ray.get_runtime_context().get_node_id()
        is_spread = any(node != self._own_node for node in self._nodes.values())
        self.host = node_address() if is_spread else None
        self._processes: list[_Actor] = []

    def devices(self, kind: str, num_ranks: int) -> tuple[str, ...]:
        """Ray shows each process its own device only."""
        return ("cpu" if kind == "cpu" else "cuda:0",) * num_ranks

    def is_here(self, rank: int, driver_rank: int) -> bool:
        return bool(self._nodes[self._bundle(rank, driver_rank)] == self._own_node)

    def launch(self, spec: PeerSpec) -> PeerProcess:
        bundle = self._bundle(spec.rank, spec.driver_rank)
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        actor = (
            ray.remote(PeerActor)
            .options(
                num_cpus=self._resources["CPU"],
                num_gpus=self._resources.get("GPU", 0.0),
                scheduling_strategy=strategy,
                max_concurrency=2,  # `run` does not return
            )
            .remote(spec.rank)
        )
        process = _Actor(actor, spec, is_here=self._nodes[bundle] == self._own_node)
        self._processes.append(process)
        return process

    def kill(self) -> None:
        """End all that it has launched."""
        for process in self._processes:
            process.kill()

    def _bundle(self, rank: int, driver_rank: int) -> int:
        return self._order[(rank - driver_rank) % len(self._order)]


class _Actor:
    """A `PeerProcess`. The handle keeps the actor alive: with its owner, this process, it ends."""

    def __init__(self, actor: Any, spec: PeerSpec, *, is_here: bool) -> None:
        self._actor = actor
        self._pid: Any = actor.pid.remote()
        self._ending: Any = actor.run.remote(spec.to_json())
        self._is_here = is_here
        self._is_killed = False

    @property
    def name(self) -> str:
        pid = self._known_pid()
        return "an actor that has not started" if pid is None else f"actor with pid {pid}"

    def wait(self, timeout_s: float) -> str | None:
        ended, _ = ray.wait([self._ending], timeout=timeout_s)
        if not ended:
            return None
        try:
            ray.get(self._ending)
        except RayError as error:
            return f"{type(error).__name__}, {str(error).splitlines()[0]}"
        return "its actor's method returned"

    def kill(self) -> None:
        """Ray asks the process to end itself, which one that is stopped does not; on this node it is killed at once."""
        if self._is_killed:
            return
        self._is_killed = True
        pid = self._known_pid() if self._is_here else None
        if pid is not None and self.wait(0.0) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(RayError):
            ray.kill(self._actor)

    def _known_pid(self) -> int | None:
        if not ray.wait([self._pid], timeout=0.0)[0]:
            return None
        with contextlib.suppress(RayError):
            return int(ray.get(self._pid))
        return None
