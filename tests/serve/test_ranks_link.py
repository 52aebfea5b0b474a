"""Frames, the handshake and the ring of a group of ranks, without processes."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from serve.ranks.link import MAX_FRAME_BYTES, Kind, Link, LinkClosed, prove_driver, prove_peer
from serve.ranks.ring import NUM_SLOTS, SLOT_BYTES, Ring

SECRET = b"s" * 32


@pytest.fixture
def links():
    """The driver's side and the peer's."""
    ours, theirs = socket.socketpair()
    driver, peer = Link(ours), Link(theirs)
    yield driver, peer
    driver.close()
    peer.close()


def handshake(driver_secret: bytes, peer_secret: bytes) -> tuple[int | str, str]:
    """What both sides come to: the rank that was proved, or what was refused."""
    ours, theirs = socket.socketpair()
    outcome: list[str] = []

    def peer() -> None:
        with theirs:
            try:
                prove_peer(theirs, peer_secret, 3)
                outcome.append("proved")
            except LinkClosed as error:
                outcome.append(str(error))

    thread = threading.Thread(target=peer)
    thread.start()
    with ours:
        try:
            rank: int | str = prove_driver(ours, driver_secret)
        except LinkClosed as error:
            rank = str(error)
    thread.join()
    return rank, outcome[0]


def test_both_sides_prove_that_they_know_the_secret():
    assert handshake(SECRET, SECRET) == (3, "proved")


def test_a_peer_without_the_secret_is_refused_and_learns_nothing():
    refused, told = handshake(SECRET, b"x" * 32)
    assert "does not know the group's secret" in refused
    assert "closed the connection" in told


def test_a_peer_trusts_no_driver_without_the_secret():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"n" * 32)
        ours.sendall(b"p" * 32)  # no proof
        with pytest.raises(LinkClosed, match="not this group's driver"):
            prove_peer(theirs, SECRET, 1)


def test_frames_arrive_whole_and_in_order(links):
    driver, peer = links
    driver.offer(Kind.TELL, b"one")
    driver.ring_bell(5, 77)
    driver.offer(Kind.END)
    assert peer.receive() == (Kind.TELL, 0, 3)
    assert bytes(peer.read(3)) == b"one"
    assert peer.receive() == (Kind.BELL, 5, 77)
    assert peer.receive() == (Kind.END, 0, 0)


def test_what_the_socket_does_not_take_is_queued_in_order(links):
    """The driver never waits: the rest leaves when the peer reads."""
    driver, peer = links
    sizes = [3_000_000, 10, 2_000_000]
    assert [driver.offer(Kind.TELL, bytes([i]) * size) for i, size in enumerate(sizes)] == [False] * 3
    assert not driver.flush()
    received: list[bytes] = []

    def read() -> None:
        for _ in sizes:
            received.append(bytes(peer.read(peer.receive()[2])))

    reader = threading.Thread(target=read)
    reader.start()
    while not driver.flush():
        pass
    reader.join()
    assert [(data[0], len(data)) for data in received] == list(enumerate(sizes))


def test_a_message_larger_than_a_frame_is_refused(links):
    with pytest.raises(ValueError, match="does not fit a frame"):
        links[0].offer(Kind.TELL, memoryview(bytes(MAX_FRAME_BYTES + 1)))


def test_a_length_that_no_side_sends_ends_the_link(links):
    driver, peer = links
    header = bytes([Kind.TELL, 0, 0, 0]) + (MAX_FRAME_BYTES + 1).to_bytes(4, "little")
    driver._socket.sendall(header)
    peer._socket.sendall(header)
    with pytest.raises(LinkClosed, match="at most"):
        peer.receive()
    with pytest.raises(LinkClosed, match="at most"):
        driver.take()


def test_replies_are_taken_when_whole(links):
    driver, peer = links
    assert driver.take() == []
    peer.send(Kind.REPLY, b"{}")
    peer._socket.sendall(bytes([Kind.ERROR]))
    assert driver.take() == [(Kind.REPLY, b"{}")]
    peer.close()
    with pytest.raises(LinkClosed):
        driver.take()


@pytest.fixture
def file():
    file = os.memfd_create("ring")
    yield file
    os.close(file)


@pytest.fixture
def ring(file):
    return Ring(file, 4, readers=[1, 3])


def test_readers_see_what_the_driver_wrote(ring, file):
    reader = Ring(file, 4)
    for number in range(3 * NUM_SLOTS):
        data = bytes([number]) * (number + 1)
        slot = ring.write(memoryview(data))
        assert reader.read(slot, len(data)) == data
        for rank in (1, 3):
            reader.done(rank)


def test_a_slot_is_written_again_only_when_every_reader_is_done(ring):
    assert [ring.write(memoryview(b"m")) for _ in range(NUM_SLOTS)] == list(range(NUM_SLOTS))
    assert ring.write(memoryview(b"m")) is None
    ring.done(1)
    assert ring.write(memoryview(b"m")) is None
    ring.done(3)
    assert ring.write(memoryview(b"m")) == 0


def test_what_is_larger_than_a_slot_is_not_for_the_ring(ring):
    assert ring.write(memoryview(bytes(SLOT_BYTES + 1))) is None
    assert ring.write(memoryview(bytes(SLOT_BYTES))) == 0


@pytest.mark.parametrize(("slot", "length"), [(NUM_SLOTS, 1), (0, SLOT_BYTES + 1)])
def test_a_bell_that_no_driver_rings_is_refused(ring, slot, length):
    with pytest.raises(ValueError, match="a bell names"):
        ring.read(slot, length)
