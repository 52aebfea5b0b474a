"""What it costs to hand a step to the other ranks: the driver's time, and the time until a peer has understood it.

    python -m loadtest.ranks [--peers 1 3] [--sequences 1 32 256] [--prompt 8192] [--steps 1000] [--pause-ms 1]

Steps are decode steps of the text engine (one token a sequence, block tables of which one in sixteen grows) and the
prefill of a prompt with its new block table. Paths: the group's own (shared-memory ring and a bell), the same bytes
inline on a Unix socket and over TCP on loopback, and `torch.distributed.broadcast_object_list` over gloo, which needs
no code and which everybody knows. Between steps the driver pauses, so that peers sleep in their sockets as they do
under load.

Figures are medians over the steps, with the 95th percentile: encode (building the message, the same for all paths but
the last), tell (the driver is busy), held (from the begin of `tell` until the last peer has decoded the step).
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from models.attention.base import TokenLayout
from serve.ranks.group import RankGroup
from serve.ranks.launch import LocalLauncher
from serve.ranks.spec import PeerSpec
from serve.text.step_message import Step, StepDecoder, StepEncoder

NUM_WARM_UP = 50
CACHED_TOKENS = 1000
BLOCK_SIZE = 16
PATHS = ("shared memory", "unix socket", "tcp loopback", "broadcast_object_list")


class ClockWorker:
    """A peer that notes when it has decoded each step. The clock is the machine's, the same in every process."""

    def __init__(self, spec: PeerSpec) -> None:
        self._driver_rank = spec.driver_rank
        self._decoder = StepDecoder()
        self._held_ns: list[int] = []

    def run(self, payload: memoryview) -> None:
        self._decoder.decode(payload)
        self._held_ns.append(time.monotonic_ns())

    def receive_objects(self, num_steps: int) -> None:
        for _ in range(num_steps):
            dist.broadcast_object_list([None], src=self._driver_rank)
            self._held_ns.append(time.monotonic_ns())

    def held_ns(self) -> dict[str, list[int]]:
        held, self._held_ns = self._held_ns, []
        self._decoder = StepDecoder()
        return {"held_ns": held}


class _TcpLauncher(LocalLauncher):
    """Peers that are treated as if they were on other nodes."""

    host = "127.0.0.1"

    def is_here(self, rank: int, driver_rank: int) -> bool:
        return False


class _Decodes:
    """Steps of `num_sequences` running sequences."""

    def __init__(self, num_sequences: int) -> None:
        self.num_sequences = num_sequences
        self._starts = [CACHED_TOKENS + i for i in range(num_sequences)]
        self._tables = [array("i", range(-(-start // BLOCK_SIZE) + 1)) for start in self._starts]

    def next(self) -> Step:
        for i, table in enumerate(self._tables):
            self._starts[i] += 1
            if self._starts[i] // BLOCK_SIZE >= len(table):
                table.append(len(table))
        num = len(self._starts)
        layout = TokenLayout([1] * num, list(self._starts), self._tables)
        return Step(list(range(100_000, 100_000 + num)), list(self._starts), layout, wants_all=True)


class _Prefills:
    """Steps that compute one prompt each."""

    num_sequences = 1

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def next(self) -> Step:
        num = self._num_tokens
        layout = TokenLayout([num], [0], [array("i", range(-(-num // BLOCK_SIZE)))])
        return Step(list(range(100_000, 100_000 + num)), list(range(num)), layout, wanted=[num - 1])


@dataclass(slots=True)
class _Figures:
    """Of each step, in µs."""

    encode: list[float]
    tell: list[float]
    held: list[float]
    num_bytes: int


def measure_messages(group: RankGroup, steps: _Decodes | _Prefills, num_steps: int, pause_s: float) -> _Figures:
    encoder = StepEncoder(2 * steps.num_sequences, BLOCK_SIZE)
    group.call("held_ns")
    began, encode, tell, sizes = [], [], [], []
    for _ in range(num_steps + NUM_WARM_UP):
        time.sleep(pause_s)
        step, t0 = steps.next(), time.monotonic_ns()
        message = encoder.encode(step)
        t1 = time.monotonic_ns()
        group.tell(message)
        t2 = time.monotonic_ns()
        began.append(t1)
        encode.append((t1 - t0) / 1e3)
        tell.append((t2 - t1) / 1e3)
        sizes.append(message.nbytes)
    return _figures(group, began, encode, tell, int(statistics.median(sizes)))


def measure_objects(group: RankGroup, steps: _Decodes | _Prefills, num_steps: int, pause_s: float) -> _Figures:
    """The same content, deltas of block tables included, as a list that torch pickles."""
    encoder = StepEncoder(2 * steps.num_sequences, BLOCK_SIZE)
    group.call("held_ns")
    replies = group.begin("receive_objects", num_steps=num_steps + NUM_WARM_UP)
    began, tell = [], []
    for _ in range(num_steps + NUM_WARM_UP):
        time.sleep(pause_s)
        content: list[Any] = encoder.encode(steps.next()).cast("i").tolist()
        t1 = time.monotonic_ns()
        dist.broadcast_object_list([content], src=group.driver_rank)
        tell.append((time.monotonic_ns() - t1) / 1e3)
        began.append(t1)
    replies.wait()
    return _figures(group, began, [0.0] * len(tell), tell, 0)


def _figures(group: RankGroup, began: list[int], encode: list[float], tell: list[float], num_bytes: int) -> _Figures:
    answers = [answer["held_ns"] for answer in group.call("held_ns")]
    last = [max(times) for times in zip(*answers)]
    held = [(at - start) / 1e3 for at, start in zip(last, began)]
    return _Figures(encode[NUM_WARM_UP:], tell[NUM_WARM_UP:], held[NUM_WARM_UP:], num_bytes)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({statistics.quantiles(values, n=20)[-1]:.0f})"


def _measure(path: str, num_peers: int, cases: dict[str, _Decodes | _Prefills], num_steps: int, pause_s: float) -> None:
    launcher = _TcpLauncher() if path == "tcp loopback" else LocalLauncher()
    with RankGroup.start("loadtest.ranks:ClockWorker", ["cpu"] * (num_peers + 1), launcher=launcher) as group:
        if path == "unix socket":
            group._ring = None  # what never happens on one node: everything travels inline
        measure = measure_objects if path == "broadcast_object_list" else measure_messages
        for name, steps in cases.items():
            figures = measure(group, steps, num_steps, pause_s)
            encode = _spread(figures.encode) if figures.num_bytes else "-"
            cells = (num_peers, path, name, figures.num_bytes or "-", encode)
            print("|", " | ".join(map(str, (*cells, _spread(figures.tell), _spread(figures.held)))), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompt", type=int, default=8192, help="tokens")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pause-ms", type=float, default=1.0)
    arguments = parser.parse_args()
    print("| peers | path | step | bytes | encode µs | tell µs | held µs |")
    print("|--:|---|---|--:|--:|--:|--:|")
    for num_peers in arguments.peers:
        for path in arguments.paths:
            cases: dict[str, _Decodes | _Prefills] = {f"{num} decodes": _Decodes(num) for num in arguments.sequences}
            cases[f"prefill of {arguments.prompt}"] = _Prefills(arguments.prompt)
            _measure(path, num_peers, cases, arguments.steps, arguments.pause_ms / 1e3)


if __name__ == "__main__":
    main()
