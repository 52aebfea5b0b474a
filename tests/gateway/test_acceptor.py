"""A listening socket takes all that wait in one turn, on any event loop, and none is lost when it closes."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest
import uvloop

from serve.gateway import acceptor
from serve.gateway.acceptor import Acceptor

NUM_CLIENTS = 50


class Listening:
    """An acceptor, and clients that have connected while its loop was busy."""

    def __init__(self) -> None:
        self.met: list[asyncio.Protocol] = []
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        self.acceptor = Acceptor(listener, self._meet)
        self.clients = [socket.create_connection(address) for _ in range(NUM_CLIENTS)]

    def _meet(self) -> asyncio.Protocol:
        self.met.append(asyncio.Protocol())
        return self.met[-1]

    async def turns(self, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    def leave(self) -> None:
        self.acceptor.close()
        for client in self.clients:
            client.close()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    def runs(test) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(test(), 20))

    return runs


def test_all_that_wait_are_taken_in_a_few_turns(run):
    async def test() -> None:
        listening = Listening()
        await listening.turns(5)
        assert len(listening.met) == NUM_CLIENTS
        listening.leave()

    run(test)


def test_closing_takes_those_that_have_connected_and_refuses_others(run):
    async def test() -> None:
        listening = Listening()
        assert listening.acceptor.is_listening
        address = listening.clients[0].getpeername()
        listening.acceptor.close()
        await listening.turns(5)
        assert len(listening.met) == NUM_CLIENTS and not listening.acceptor.is_listening
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        listening.leave()

    run(test)


def test_without_descriptors_it_pauses_and_goes_on(monkeypatch):
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.0)

    class Exhausted:
        """The listener of a process that has no descriptor left, once."""

        def __init__(self, listener: socket.socket) -> None:
            self.listener = listener
            self.has_failed = False

        def __getattr__(self, name):
            return getattr(self.listener, name)

        def accept(self):
            if not self.has_failed:
                self.has_failed = True
                raise OSError(errno.EMFILE, "too many open files")
            return self.listener.accept()

    async def test() -> None:
        listening = Listening()
        listening.acceptor._listener = exhausted = Exhausted(listening.acceptor._listener)
        async with asyncio.timeout(10):
            while len(listening.met) < NUM_CLIENTS:
                await asyncio.sleep(0)
        assert exhausted.has_failed
        listening.leave()

    asyncio.run(test())
