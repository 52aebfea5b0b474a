"""Where peers reach the driver while their group starts: a Unix socket on this node, a TCP port for other nodes."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from serve.errors import EngineDead
from serve.ranks.launch import PeerProcess
from serve.ranks.link import Link, LinkClosed, hand_over, prove_driver

log = logging.getLogger(__name__)

_POLL_S = 0.1
"""How soon the end of a peer that has not connected yet is noticed."""


class Listeners:
    """Open until every peer has connected."""

    def __init__(self, directory: Path, host: str | None):
        path = f"{directory}/driver"
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(path)
        unix.listen()
        self.unix_address = f"unix:{path}"
        self.tcp_address = ""
        self._sockets = [unix]
        if host is not None:
            tcp = socket.create_server((host, 0))
            self._sockets.append(tcp)
            self.tcp_address = f"tcp:{host}:{tcp.getsockname()[1]}"

    def accept(
        self, processes: Mapping[int, PeerProcess], secret: bytes, ring: int, timeout_s: float
    ) -> dict[int, Link]:
        """Each peer's proven connection, by rank; those of this node get the file `ring`.

        Raises EngineDead when one ends before, or does not come.
        """
        links: dict[int, Link] = {}
        until = time.monotonic() + timeout_s
        while missing := sorted(processes.keys() - links.keys()):
            for listening in select.select(self._sockets, (), (), _POLL_S)[0]:
                sock, _ = listening.accept()
                try:
                    rank = prove_driver(sock, secret)
                    if sock.family == socket.AF_UNIX:
                        hand_over(sock, ring)
                except (OSError, LinkClosed) as error:
                    log.warning("a connection was refused cause=%s", error)
                    sock.close()
                    continue
                if rank not in missing:
                    log.warning("a connection was refused cause=rank %d is not awaited", rank)
                    sock.close()
                    continue
                links[rank] = Link(sock)
            for rank in processes.keys() - links.keys():
                if (ending := processes[rank].wait(0.0)) is not None:
                    said = f"rank {rank} ({processes[rank].name}) ended before it connected: {ending}; see its log"
                    raise EngineDead(said)
            if time.monotonic() > until:
                raise EngineDead(f"ranks {missing} have not connected within {timeout_s:g} s")
        return dict(sorted(links.items()))

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()
