"""Streams over gateways that share a port: which one each is at, and what its client sees when that is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import psutil
from serving import Serving, eventually

PER_GATEWAY = 2
MOST = 64
"""Streams to open at most until each gateway has some. The kernel spreads connections by a hash: that all but one of 64
come to the same of two has a probability of 2^-57."""
NUM_TOKENS = 3500
"""More than can be read while a test looks."""


@dataclass(eq=False)
class Reader(threading.Thread):
    """A client that reads a stream until it ends, breaks or is told to leave."""

    url: str
    num_tokens: int
    num_pieces: int = 0
    has_ended: bool = False
    error: str = ""
    port: int = 0
    """Its own, of the connection."""
    is_to_leave: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.start()

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "the red fox", "max_tokens": self.num_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
                assert response.status_code == 200, response.read()
                self.port = response.extensions["network_stream"].get_extra_info("client_addr")[1]
                for line in response.iter_lines():
                    self.num_pieces += line.startswith("data: {")
                    self.has_ended |= line == "data: [DONE]"
                    if '"error"' in line:
                        self.error = line
                    if self.is_to_leave.is_set():
                        return
        except httpx.HTTPError as error:
            self.error = type(error).__name__

    def has_begun(self) -> None:
        """Wait for its first piece."""
        eventually(lambda: self.num_pieces or self.error, within_s=60)
        assert not self.error, self.error

    def reads_on(self) -> None:
        """Wait for more of the stream."""
        seen = self.num_pieces
        eventually(lambda: self.num_pieces > seen + 10 or self.has_ended or self.error, within_s=60)
        assert not self.error, self.error


def spread(server: Serving, gateways: list[psutil.Process], num_tokens: int = NUM_TOKENS) -> dict[int, list[Reader]]:
    """Streams that are being read, at least `PER_GATEWAY` at each gateway, by its pid."""
    at: dict[int, list[Reader]] = {gateway.pid: [] for gateway in gateways}
    for _ in range(MOST):
        reader = Reader(server.url, num_tokens)
        reader.has_begun()
        [owner] = [gateway.pid for gateway in gateways if reader.port in _peers(gateway)]
        at[owner].append(reader)
        if min(map(len, at.values())) >= PER_GATEWAY:
            return at
    raise AssertionError(f"all streams are at one gateway: { {pid: len(readers) for pid, readers in at.items()} }")


def _peers(process: psutil.Process) -> set[int]:
    return {connection.raddr.port for connection in process.net_connections("tcp") if connection.raddr}


def a_gateways_death_costs_its_own_connections_only(
    server: Serving, gateways: Callable[[], list[psutil.Process]]
) -> None:
    """SIGKILL for one of the two that `gateways` finds. What the other has goes on, what the dead one had is freed, and
    another one comes."""
    found = gateways()
    assert len(found) == 2
    at = spread(server, found)
    victim, other = found
    eventually(lambda: server.metric("tandem_kv_cache_usage_ratio") > 0)
    victim.kill()
    for reader in at[victim.pid]:
        reader.join(60)
        assert reader.error and not reader.has_ended
    survivors = at[other.pid]
    eventually(lambda: server.metric("tandem_requests_running") == len(survivors), within_s=60)
    for reader in survivors:
        reader.reads_on()
        assert not reader.has_ended
    eventually(lambda: len(gateways()) == 2, within_s=90)
    assert victim.pid not in {gateway.pid for gateway in gateways()}
    for reader in survivors:
        reader.reads_on()
        reader.is_to_leave.set()
    eventually(lambda: server.metric("tandem_requests_running") == 0, within_s=60)
    eventually(lambda: server.metric("tandem_kv_cache_usage_ratio") == 0, within_s=60)
    eventually(lambda: _answers_at_each(server, gateways()), within_s=120, every_s=0.2)


def _answers_at_each(server: Serving, gateways: list[psutil.Process]) -> bool:
    """Whether both listen and have all models; the new one listens once it has met them."""
    port = int(server.url.rsplit(":", 1)[1])
    listening = [
        gateway
        for gateway in gateways
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in gateway.net_connections("tcp"))
    ]
    return len(listening) == 2 and all(
        httpx.get(f"{server.url}/readyz", timeout=10).status_code == 200 for _ in range(8)
    )
