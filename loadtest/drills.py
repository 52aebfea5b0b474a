"""Parts of a running system are killed, hung, added, taken away and replaced, each under twenty streaming clients.

    python -m loadtest.drills [FAULT ...]

On a Ray cluster of three nodes on this machine, with two replicas of `tandem-text` (or `--model`). For every fault:
what the clients saw, when the system knew, the longest pause of a stream, how long until the system was whole again,
what was lost, and whether a KV block, a job or a process stayed behind. New requests come all the while, one after the
other.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loadtest.cluster import LocalCluster, eventually, is_gone
from loadtest.crowd import Crowd, Seen
from loadtest.observer import Observer

NUM_CLIENTS = 20
NAME = "drilled"
PROMPTS = ("Tell me a story about a cat.", "What is 27 + 58?", "the red fox", "a grey cat and")
RANK_PATIENCE_S = 10.0
"""`step_timeout_s` of a model on two ranks: how long a rank may hang."""
HEAD_CPUS, NODE_CPUS = 3, 5
"""Whole, as Ray wants it. A rank takes two, the gateway a quarter: two ranks a node, and one beside the gateway. When a
node is lost, two replicas of one rank fit the others, and two of two ranks do not."""


@dataclass(slots=True)
class Outcome:
    """What a fault did."""

    fault: str
    num_same: int
    """Clients that read to the end what they would have read undisturbed."""
    errors: list[str]
    """What the others saw."""
    num_probes: int
    probe_errors: list[str]
    known_s: float | None
    """From the fault until the system knew: the channel to every replica that it cost had ended; where it cost none but
    a gateway, that one's jobs were free. None where nothing is lost, or nobody has to know."""
    pause_s: float
    """The longest that any client waited for a piece, from the fault on."""
    probe_s: float
    """The longest that a new request took."""
    whole_s: float
    """From the fault until everything that should run does."""
    num_moves: float
    """Streams that went on at another replica; the gateway's own count."""
    left_behind: list[str]
    lag_s: float
    """The longest that the clients themselves were held up."""


@dataclass(slots=True)
class Site:
    """The cluster, what runs there now, and what it should answer."""

    cluster: LocalCluster
    observer: Observer
    model: dict[str, Any]
    num_tokens: int
    num_replicas: int = 2
    drain_timeout_s: float = 1.0
    nodes: list[Any] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    victims: list[psutil.Process] = field(default_factory=list)
    """Processes that a fault is to have ended."""

    def deploy(self) -> None:
        self.cluster.deploy(self.model, num_replicas=self.num_replicas, drain_timeout_s=self.drain_timeout_s)

    def bodies(self) -> list[dict[str, Any]]:
        common = {"model": NAME, "ignore_eos": True, "max_tokens": self.num_tokens}
        return [
            {**common, "prompt": PROMPTS[i % len(PROMPTS)], "temperature": float(i % 4 > 0), "seed": i}
            for i in range(NUM_CLIENTS)
        ]

    def learn(self) -> None:
        """What the clients read when nothing happens."""
        seen = Crowd(self.cluster.url, self.bodies()).finish()
        assert all(each.is_complete for each in seen), [each.error for each in seen]
        self.expected = [each.text for each in seen]

    def drivers(self, node: Any = None) -> list[psutil.Process]:
        return self.cluster.processes(f"ServeReplica:tandem:model-{NAME}", node)

    def ranks(self, node: Any) -> list[psutil.Process]:
        return self.drivers(node) + self.cluster.processes("PeerActor", node)

    @property
    def num_ranks(self) -> int:
        return int(self.model.get("tensor_parallel_size", 1))

    def is_whole(self) -> bool:
        """Every replica and rank runs and is registered, and no other does."""
        num_peers = len(self.cluster.processes("PeerActor"))
        is_complete = len(self.drivers()) == self.num_replicas and num_peers == self.num_replicas * (self.num_ranks - 1)
        is_known = is_complete and self.observer.num_connected == self.num_replicas
        return is_known and self.cluster.is_ready() and self.cluster.metric("tandem_replicas") == self.num_replicas

    def known_s(self, fault: Fault, moment: float) -> float | None:
        """See `Outcome`."""
        if fault in COSTS_REPLICAS:
            return self.observer.lost_s(moment)
        return self.observer.freed_s(moment) if fault is kill_gateway else None

    def left_behind(self) -> list[str]:
        """Jobs, blocks and processes that should be gone."""
        found = []
        for name in ("tandem_requests_running", "tandem_requests_waiting", "tandem_kv_cache_usage_ratio"):
            if value := self.cluster.metric(name):
                found.append(f"{name} {value:g}")
        return found + [f"process {victim.pid}" for victim in self.victims if not is_gone(victim)]


Fault = Callable[[Site], None]


def nothing(site: Site) -> None:
    """For comparison."""


def kill_replica(site: Site) -> None:
    """SIGKILL for a replica's process."""
    _end(site, site.drivers()[:1])


def kill_replicas(site: Site) -> None:
    """SIGKILL for all processes of the model, as on one node that dies: until one is back there is none."""
    _end(site, site.drivers())


def kill_rank(site: Site) -> None:
    """SIGKILL for a rank that is not the replica's own."""
    _end(site, site.cluster.processes("PeerActor")[:1])


def hang_rank(site: Site) -> None:
    """SIGSTOP for such a rank: it answers nobody any more and keeps its connections."""
    site.victims = site.cluster.processes("PeerActor")[:1]
    site.victims[0].suspend()


def kill_gateway(site: Site) -> None:
    """SIGKILL for the only gateway."""
    _end(site, site.cluster.processes("ServeReplica:tandem:gateway"))


def kill_controller(site: Site) -> None:
    """SIGKILL for Serve's controller, which Ray starts again; replicas and gateways must not mind."""
    _end(site, site.cluster.processes("ServeController"))
    eventually(lambda: site.cluster.processes("ServeController"), "the controller is back")


def kill_node(site: Site) -> None:
    """SIGKILL for the raylet of a node that holds ranks of the model and not the gateway."""
    node = next(
        node
        for node in site.nodes
        if site.ranks(node) and not site.cluster.processes("ServeReplica:tandem:gateway", node)
    )
    site.victims = site.cluster.processes("ServeReplica", node) + site.cluster.processes("PeerActor", node)
    site.nodes.remove(node)
    site.cluster.kill_node(node)


def add_node(site: Site) -> None:
    """A new node, as after one was lost."""
    site.nodes.append(site.cluster.add_node(num_cpus=NODE_CPUS))


def scale_up(site: Site) -> None:
    """One replica more."""
    site.num_replicas += 1
    site.deploy()


def scale_down(site: Site) -> None:
    """One replica less, which may not finish what it has: streams are longer than the drain."""
    site.num_replicas -= 1
    site.deploy()


def redeploy(site: Site) -> None:
    """The same model, all processes replaced; streams do not fit into the drain and go on at the new ones."""
    site.drain_timeout_s, site.victims = site.drain_timeout_s + 29.0, site.drivers()
    site.deploy()


@contextmanager
def updated(site: Site, **model: Any) -> Iterator[Fault]:
    """A fault that gives the model other weights and options. Streams end on the old ones, in the drain's time."""
    with tempfile.TemporaryDirectory() as path:
        folder = altered(Path(site.model["model"]), Path(path) / "altered")

        def update(site: Site) -> None:
            """Other weights and another config, rolled out."""
            site.model, site.victims = {**site.model, "model": str(folder), **model}, site.drivers()
            site.deploy()

        yield update


def altered(folder: Path, target: Path) -> Path:
    """A copy of a model with slightly other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        weights = load_file(file)
        save_file({name: (weight * 1.01).to(weight.dtype) for name, weight in weights.items()}, file, {"format": "pt"})
    return target


def run(site: Site, fault: Fault) -> Outcome:
    """Clients read, the fault happens, and everything settles."""
    before = site.cluster.metric("tandem_failovers_total")
    site.victims = []
    expected = site.expected
    probe = {**site.bodies()[1], "max_tokens": 4}
    crowd = Crowd(site.cluster.url, site.bodies(), probe)
    crowd.wait_until_read(5)
    moment = time.monotonic()
    fault(site)
    if fault in COSTS_REPLICAS:
        eventually(lambda: site.observer.lost_s(moment), "the loss is known")
    eventually(site.is_whole, "the system is whole again")
    whole_s = time.monotonic() - moment
    seen = crowd.finish()
    eventually(lambda: not site.left_behind(), f"nothing is left behind, but {site.left_behind()}", 60.0)
    return Outcome(
        fault=fault.__name__,
        num_same=sum(each.is_complete and each.text == text for each, text in zip(seen, expected)),
        errors=_errors(seen)
        + ["another answer" for e, text in zip(seen, expected) if e.is_complete and e.text != text],
        num_probes=len(crowd.probes),
        probe_errors=_errors(crowd.probes),
        known_s=site.known_s(fault, moment),
        pause_s=max(each.pause_after(moment) for each in seen),
        probe_s=max(each.took_s for each in crowd.probes),
        whole_s=whole_s,
        num_moves=max(0.0, site.cluster.metric("tandem_failovers_total") - before),
        left_behind=site.left_behind(),
        lag_s=crowd.lag_s,
    )


def _errors(seen: list[Seen]) -> list[str]:
    return [each.error for each in seen if each.error]


def _end(site: Site, processes: list[psutil.Process]) -> None:
    site.victims = processes
    for process in processes:
        process.kill()


@contextmanager
def started(model: dict[str, Any], num_tokens: int) -> Iterator[Site]:
    """Three nodes and two replicas, one of them on a node that can be killed: the first node is full."""
    cluster = LocalCluster(num_cpus=HEAD_CPUS)
    try:
        named = {**model, "served_model_name": [NAME], "num_cpus": 2.0}
        cluster.deploy(named, num_replicas=1, drain_timeout_s=1.0)
        site = Site(cluster, cluster.observer(), named, num_tokens)
        for _ in range(2):
            add_node(site)
        site.deploy()
        site.learn()
        yield site
        site.observer.close()
    finally:
        cluster.close()


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (kill_replica, kill_replicas, kill_controller, scale_up, scale_down, kill_gateway, redeploy, kill_node)
}
RANK_FAULTS: dict[str, Fault] = {fault.__name__: fault for fault in (kill_rank, hang_rank)}

COSTS_REPLICAS = {kill_replica, kill_replicas, kill_rank, hang_rank, kill_node}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*FAULTS, "update", *RANK_FAULTS]
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(known)}; none: all")
    parser.add_argument("--model", default="tandem-text", help="a folder or an embedded model")
    parser.add_argument("--num-tokens", type=int, default=400, metavar="N", help="of every stream (default 400)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    if unknown := set(options.faults) - set(known):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    from models.source import resolve

    wanted = options.faults or known
    model = {"model": str(resolve(options.model)), "threads": 1, "dtype": "float32"}
    print(HEAD)
    told: list[str] = []

    def drill(fault: Fault) -> None:
        told.append(row(run(site, fault)))
        print(told[-1], flush=True)
        if options.output is not None:
            options.output.write_text("\n".join([HEAD, *told]) + "\n")

    with started(model, options.num_tokens) as site:
        drill(nothing)
        for name, fault in FAULTS.items():
            if name in wanted:
                drill(fault)
        if "kill_node" in wanted:
            add_node(site)
        if "update" in wanted or set(wanted) & set(RANK_FAULTS):
            with updated(site, tensor_parallel_size=2, step_timeout_s=RANK_PATIENCE_S) as update:
                drill(update)
                site.learn()
                for name, fault in RANK_FAULTS.items():
                    if name in wanted:
                        drill(fault)


HEAD = (
    "| fault | read on | lost: streams, new of all | moved | known after | longest pause | longest new request | "
    "whole again | left behind |\n|---|---|---|---|---|---|---|---|---|"
)


def row(outcome: Outcome) -> str:
    """Of the table; what was not as it should be below it."""
    told = sorted(set(outcome.errors + outcome.probe_errors))
    line = (
        f"| {outcome.fault} | {outcome.num_same} of {NUM_CLIENTS} | {len(outcome.errors)}, "
        f"{len(outcome.probe_errors)} of {outcome.num_probes} | {outcome.num_moves:g} | "
        f"{'' if outcome.known_s is None else f'{outcome.known_s:.2f} s'} | {outcome.pause_s:.2f} s | "
        f"{outcome.probe_s:.2f} s | {outcome.whole_s:.1f} s | {', '.join(outcome.left_behind) or 'nothing'} |"
    )
    lag = [f"    the clients themselves were held up for {outcome.lag_s:.1f} s"] if outcome.lag_s > 0.5 else []
    return "\n".join([line, *lag, *(f"    {error[:200]}" for error in told)])


if __name__ == "__main__":
    main()
