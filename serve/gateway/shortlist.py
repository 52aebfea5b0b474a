"""Which of many replicas are looked at for a request: a few drawn at random, and those it has a reason to go to.

To look at all of them has two faults. It takes time with each replica. And gateways that do not know of each other all
read the same reports, a tenth of a second old, and send what comes next to the same least loaded replica: a herd
(Mitzenmacher, "How Useful Is Old Information?", 2000). The best of a few drawn at random is nearly as good as the best
of all, already with two (the same, 2001), and no two gateways draw the same.

A request has a reason to go where most of its prompt is cached, and where its session lives. Both are found among all,
in some tenth of a microsecond a replica.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

NUM_DRAWN = 32
"""See `loadtest/results/simulator.md`."""
NUM_HOLDERS = 8
"""Replicas that are looked at for what they have cached: a system prompt that all have is no reason to look at all."""


def longest_holders(
    keys: Sequence[int], holdings: Iterable[tuple[str, set[int]]], num: int, source: random.Random
) -> list[str]:
    """The `num` replicas that have the most of a prompt with these keys, drawn at random among equals.

    `holdings`: replica → its keys. A replica that has a block is taken to have those before it, as its cache evicts the
    ends of prefixes first, so the depth at which `num` are left is found by bisection.
    """
    if not keys:
        return []
    many = [(name, held) for name, held in holdings if keys[0] in held]
    few: list[tuple[str, set[int]]] = []
    low, high = 0, len(keys)  # more than `num` have block `low`, no more than `num` have block `high`
    while len(many) > num and high - low > 1:
        middle = (low + high) // 2
        deeper = [(name, held) for name, held in many if keys[middle] in held]
        if len(deeper) > num:
            low, many = middle, deeper
        else:
            high, few = middle, deeper
    chosen = [name for name, _ in few]
    others = [name for name, _ in many if name not in chosen]
    return chosen + source.sample(others, min(len(others), num - len(chosen)))


def rendezvous(session: str, replica_ids: Iterable[str]) -> list[int]:
    """A value for each replica; the highest is the session's home. Each session orders all replicas in its own way, and
    keeps that order when others come or go (Thaler and Ravishankar, 1996)."""
    point = _point(session)
    products = [(point ^ _point_of_replica(name)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF for name in replica_ids]
    return [product ^ product >> 32 for product in products]


def home(session: str, replica_ids: Sequence[str]) -> str:
    """Where the session lives among these."""
    values = rendezvous(session, replica_ids)
    return replica_ids[values.index(max(values))]


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


_point_of_replica = lru_cache(maxsize=1 << 13)(_point)
