"""A peer's process: connect to the driver, join torch.distributed, do what the driver says until the connection ends.

A peer lives exactly as long as its driver. A thread of its own waits for the end of the connection, so that a peer also
leaves when it is held up in a collective with the others. What goes wrong here is sent up in its own words, and ends
the process: the driver then ends the group.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from serve.errors import ConfigError, TandemError
from serve.logs import configure_logging
from serve.ranks.failure import is_echo
from serve.ranks.link import Kind, Link, LinkClosed, prove_peer, take_over
from serve.ranks.ring import Ring
from serve.ranks.spec import PeerSpec, Worker

log = logging.getLogger(__name__)

CONNECT_S = 30.0
LAST_S = 5.0
"""From last words to the end, which the driver brings sooner: by killing this process, or by being gone itself. Until
then the collective that the others stand in does not fail for them, so that they do not complain, too."""
_WINDOW_BYTES = 1 << 20
"""A prefill's message of 8192 tokens is 34 KiB, the first of 256 long sequences 70."""
_NOTHING = b"{}"


def main() -> NoReturn:
    """The entry point of a child process; the spec is the first line of standard input."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the driver decides
        signal.signal(number, signal.SIG_IGN)
    spec = PeerSpec.from_json(sys.stdin.buffer.readline())
    configure_logging(rank=spec.rank)
    run(spec)


def run(spec: PeerSpec) -> NoReturn:
    """Be the peer `spec` describes. Ends this process, whatever comes."""
    try:
        link, ring = connect(spec)
    except (OSError, LinkClosed) as error:
        log.error("the driver cannot be reached address=%s cause=%r", spec.address, error)
        _leave(spec.directory, 1)
    threading.Thread(target=_end_with_driver, args=(link, spec.directory), name="driver-watch", daemon=True).start()
    try:
        _serve(spec, link, ring)
    except LinkClosed:
        _leave(spec.directory)
    except BaseException as error:
        if is_echo(error):
            log.error("rank ends with another cause=%s", str(error).splitlines()[0])
        elif not isinstance(error, ConfigError):  # which the driver's side prints, once
            log.exception("rank failed")
        _send_last_words(link, error)
        time.sleep(LAST_S)
        _leave(spec.directory, 1)
    os._exit(0)


def connect(spec: PeerSpec) -> tuple[Link, Ring | None]:
    """A proven connection to the driver, and the ring on its node. Raises OSError and LinkClosed."""
    scheme, _, place = spec.address.partition(":")
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(place)
    else:
        host, _, port = place.rpartition(":")
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Before it connects: a window of the usual 64 KiB stalls a larger message for 200 ms, once, over loopback.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW_BYTES)
        sock.settimeout(CONNECT_S)
        sock.connect((host, int(port)))
    prove_peer(sock, bytes.fromhex(spec.secret), spec.rank)
    if scheme != "unix":
        return Link(sock), None
    file = take_over(sock)
    ring = Ring(file, spec.world_size)
    os.close(file)
    return Link(sock), ring


def _serve(spec: PeerSpec, link: Link, ring: Ring | None) -> None:
    worker = _make_worker(spec, link)
    link.send(Kind.REPLY, _NOTHING)
    while True:
        kind, slot, length = link.receive()
        if kind == Kind.BELL:
            assert ring is not None, "a bell without a ring"
            worker.run(ring.read(slot, length))
            ring.done(spec.rank)
        elif kind == Kind.TELL:
            worker.run(link.read(length))
        elif kind == Kind.CALL:
            link.send(Kind.REPLY, _call(worker, bytes(link.read(length))))
        elif kind == Kind.END:
            return
        else:
            raise ValueError(f"a frame of the unknown kind {kind} came")


def _make_worker(spec: PeerSpec, link: Link) -> Worker:
    import torch

    from serve.ranks.join import join, make_store

    torch.set_num_threads(spec.threads)
    module, _, name = spec.worker.partition(":")
    make = getattr(importlib.import_module(module), name)
    link.send(Kind.REPLY, _NOTHING)  # what can fail alone has not: the driver may join, too
    store, _ = make_store(spec.store, spec.world_size)
    host = None if spec.store.startswith("file:") else link.own_host
    join(store, rank=spec.rank, world_size=spec.world_size, device=spec.device, host=host)
    worker: Worker = make(spec)
    return worker


def _call(worker: Worker, body: bytes) -> bytes:
    call = json.loads(body)
    return json.dumps(getattr(worker, call["method"])(**call["arguments"]) or {}).encode()


def _send_last_words(link: Link, error: BaseException) -> None:
    """`code` and `param` of an error of ours travel along, so that a ConfigError is one on the driver's side too."""
    words = {"type": type(error).__name__, "message": str(error)[:8192], "is_echo": is_echo(error)}
    if isinstance(error, TandemError):
        words |= {"code": error.code, "param": error.param or ""}
    try:
        link.send(Kind.ERROR, json.dumps(words).encode())
    except OSError:
        log.warning("the driver is gone too")


def _end_with_driver(link: Link, directory: str | None) -> None:
    poll = select.poll()
    poll.register(link.fileno(), select.POLLRDHUP)
    poll.poll()
    _leave(directory)


def _leave(directory: str | None, status: int = 0) -> NoReturn:
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(status)
