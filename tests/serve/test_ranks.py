"""A group of ranks as processes: what they are told, and who may tell them."""

from __future__ import annotations

import psutil
import pytest
from ranks_worker import WORKER, message, sum_here

from serve.ranks.group import RankGroup
from serve.ranks.ring import NUM_SLOTS, SLOT_BYTES


@pytest.fixture(scope="module")
def group():
    """Three ranks; the driver is the middle one."""
    with RankGroup.start(WORKER, ["cpu"] * 3, driver_rank=1, threads=2) as group:
        yield group


def peers(group: RankGroup) -> list[psutil.Process]:
    return [psutil.Process(answer["pid"]) for answer in group.call("load")]


def test_every_peer_answers_a_call_in_the_order_of_ranks(group):
    assert [(answer["rank"], answer["threads"]) for answer in group.call("load")] == [(0, 2), (2, 2)]


def test_peers_are_told_everything_once_and_in_order_while_they_are_held_up(group):
    """The driver tells far ahead of what peers have done: small messages, those too large for the ring, and more than a
    socket holds. They stand in the first collective until the driver comes to it."""
    sizes = [100, SLOT_BYTES + 1, 100, SLOT_BYTES] * (NUM_SLOTS // 2)
    for number, size in enumerate(sizes):
        group.tell(message(size=size, number=number, sums=True))
    assert [sum_here() for _ in sizes] == [3.0] * len(sizes)
    expected = [list(pair) for pair in enumerate(sizes)]
    assert [answer["told"] for answer in group.call("told")] == [expected] * 2


def test_the_secret_is_in_no_command_line_or_environment(group):
    secret = group._secret.hex()
    for peer in peers(group):
        assert secret not in " ".join(peer.cmdline())
        assert secret not in " ".join(peer.environ().values())


def test_peers_listen_on_loopback_only(group):
    listening = [c for peer in peers(group) for c in peer.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening and {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
