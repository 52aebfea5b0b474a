"""The driver's end of a group of ranks: starts the peers, tells them what to do, and ends them, all or none.

    engine thread ── tell(bytes) ──▶ ring and bells ──▶ every peer's worker.run
    builder       ── call(method) ──▶ every peer's worker.method ──▶ replies
    watch thread  ◀── replies, last words, ends of connections

A group is whole or it is *lost*: a peer that says it failed, or whose connection ends, takes the others with it. The
watch then keeps the first cause as `failure`, kills every peer (SIGKILL: one that hangs or is stopped leaves no other
way) and tells `on_death`; a collective that the driver stands in fails, because the other side is gone. A peer that
hangs says nothing: the engine's step deadline finds it, and `close` kills it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve.errors import EngineDead, TandemError
from serve.ranks.failure import Loss, first_cause
from serve.ranks.launch import Launcher, LocalLauncher, PeerProcess
from serve.ranks.link import Kind, Link, LinkClosed, Payload
from serve.ranks.listen import Listeners
from serve.ranks.ring import Ring
from serve.ranks.spec import PeerSpec

log = logging.getLogger(__name__)

START_S = 300.0
"""For every peer to import torch and to join. Weights are loaded later."""
CALL_S = 7200.0
"""For a call: loading is the longest, and a peer that fails is heard at once."""
LAST_WORDS_S = 0.3
"""How long the others may still speak when one peer has ended: the first to be seen need not be the first to fail."""
EXPLAIN_S = 2.0
"""From the failure of a collective here to the news of its cause."""
CLOSE_S = 2.0
"""For peers to end by themselves before they are killed."""


class Replies:
    """The answers to one call, one per peer, by rank. The driver does its own part before it waits."""

    def __init__(self, group: RankGroup, ranks: Sequence[int]):
        self._group = group
        self._missing = set(ranks)
        self._bodies: dict[int, dict[str, Any]] = {}

    def add(self, rank: int, body: bytes) -> None:
        self._bodies[rank] = json.loads(body)
        self._missing.discard(rank)

    def wait(self, timeout_s: float = CALL_S) -> list[dict[str, Any]]:
        """Raises what ended the group meanwhile, or EngineDead when an answer does not come."""
        self._group.wait_for(lambda: not self._missing, timeout_s, f"no answer from ranks {sorted(self._missing)}")
        return [self._bodies[rank] for rank in sorted(self._bodies)]


class RankGroup:
    """One model's ranks, seen from the driver. Make it with `start`; `close` it, or use it in a `with`.

    torch.distributed knows one world per process, so a process drives one group at a time.
    """

    @classmethod
    def start(
        cls,
        worker: str,
        devices: Sequence[str],
        *,
        driver_rank: int = 0,
        threads: int = 1,
        launcher: Launcher | None = None,
    ) -> RankGroup:
        """Start a peer for every rank but the driver's and join torch.distributed with them. Blocks.

        `worker`: an entry of `WORKERS`. `devices`: each rank's, as `Launcher.devices` names them. `threads`: of each
        peer. Raises what a peer failed with: ConfigError as it was, anything else as EngineDead.
        """
        group = cls(worker, devices, driver_rank, threads, launcher or LocalLauncher())
        try:
            group._start()
        except BaseException:
            group.close()
            raise
        return group

    def __init__(self, worker: str, devices: Sequence[str], driver_rank: int, threads: int, launcher: Launcher):
        self.world_size = len(devices)
        self.driver_rank = driver_rank
        self.peer_ranks = tuple(rank for rank in range(self.world_size) if rank != driver_rank)
        self.failure: TandemError | None = None
        """Why the group was lost."""
        self._worker = worker
        self._devices = tuple(devices)
        self._threads = threads
        self._launcher = launcher
        self._secret = secrets.token_bytes(32)
        self.directory = Path(tempfile.mkdtemp(prefix="tandem-ranks-", dir=launcher.directory))  # 0700
        self._processes: dict[int, PeerProcess] = {}
        self._links: dict[int, Link] = {}
        self._in_ring: tuple[Link, ...] = ()
        self._inline: tuple[Link, ...] = ()
        self._ring: Ring | None = None
        self._replies: Replies | None = None
        self._on_death: Callable[[BaseException], None] | None = None
        self._changed = threading.Condition()
        self._is_closing = False
        self._has_joined = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._wake = socket.socketpair()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- for the driver --------------------------------------------------------------------------------------------

    def tell(self, payload: Payload) -> None:
        """Give these bytes to every peer's `Worker.run`, in order, without waiting for them. Raises why it is lost.

        One thread at a time. The bytes may be changed after the return.
        """
        if self.failure is not None:
            raise self.failure
        view = memoryview(payload)
        data = view if view.itemsize == 1 else view.cast("B")
        try:
            slot = self._ring.write(data) if self._ring is not None else None
            has_all_left = True
            if slot is None:
                for link in self._links.values():
                    has_all_left &= link.offer(Kind.TELL, data)
            else:
                for link in self._in_ring:
                    has_all_left &= link.ring_bell(slot, len(data))
                for link in self._inline:
                    has_all_left &= link.offer(Kind.TELL, data)
        except (OSError, LinkClosed) as error:
            raise self.explain(EngineDead(f"a rank cannot be told: {error}")) from error
        if not has_all_left:
            self._bell.send(b"!")

    def begin(self, method: str, **arguments: Any) -> Replies:
        """Call `method` of every peer's worker with what JSON holds; the driver does its own part, then `wait`s."""
        if self.failure is not None:
            raise self.failure
        self._replies = replies = Replies(self, self.peer_ranks)
        body = json.dumps({"method": method, "arguments": arguments}).encode()
        try:
            for link in self._links.values():
                link.offer(Kind.CALL, body)
        except (OSError, LinkClosed) as error:
            raise self.explain(EngineDead(f"a rank cannot be called: {error}")) from error
        self._bell.send(b"!")
        return replies

    def call(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """`begin` and `wait`: for what the driver has no part in."""
        return self.begin(method, **arguments).wait()

    def watch(self, on_death: Callable[[BaseException], None]) -> None:
        """The start is over: nothing of the group stays on disk, and from now on `on_death` is told that it is lost,
        from the watch's thread, once."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with self._changed:
            failure = self.failure
            self._on_death = on_death
        if failure is not None:
            on_death(failure)

    def explain(self, error: Exception) -> Exception:
        """What to raise for `error`, which a collective or `tell` raised here: why the group was lost, if it was."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self._is_closing, EXPLAIN_S)
        return self.failure or error

    def close(self) -> None:
        """End the peers, by force those that do not end by themselves. Any number of times, any thread."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
        for link in self._links.values():
            with contextlib.suppress(OSError, LinkClosed):
                link.offer(Kind.END)
        until = time.monotonic() + (CLOSE_S if self.failure is None else 0.0)
        for rank, process in self._processes.items():
            if rank in self._links:
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
        self._bell.send(b"!")
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        for link in self._links.values():
            link.close()
        self._bell.close()
        self._wake.close()
        self._selector.close()
        self._leave()
        shutil.rmtree(self.directory, ignore_errors=True)

    def wait_for(self, is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Raises why the group was lost, or EngineDead saying `what` when the time is over."""
        with self._changed:
            is_over = self._changed.wait_for(lambda: self.failure is not None or is_done(), timeout_s)
        if self.failure is not None:
            raise self.failure
        if not is_over:
            raise EngineDead(f"{what} after {timeout_s:g} s")

    # -- the start -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        from serve.ranks.join import make_store  # torch

        here = [rank for rank in self.peer_ranks if self._launcher.is_here(rank, self.driver_rank)]
        host = self._launcher.host
        where = f"file:{self.directory}/store" if host is None else f"tcp:{host}:0"
        store, where = make_store(where, self.world_size, is_master=True)
        with open(os.memfd_create("tandem-ranks"), "wb") as ring, Listeners(self.directory, host) as listeners:
            if here:
                self._ring = Ring(ring.fileno(), self.world_size, here)
            for rank in self.peer_ranks:
                address = listeners.unix_address if rank in here else listeners.tcp_address
                self._processes[rank] = self._launcher.launch(self._spec(rank, address, where))
            self._links = listeners.accept(self._processes, self._secret, ring.fileno(), START_S)
        self._in_ring = tuple(self._links[rank] for rank in here)
        self._inline = tuple(link for rank, link in self._links.items() if rank not in here)
        self._replies = imported = Replies(self, self.peer_ranks)
        self._watcher = threading.Thread(target=self._watch, name="ranks-watch", daemon=True)
        self._watcher.start()
        imported.wait(START_S)
        self._replies = joined = Replies(self, self.peer_ranks)
        self._join(store, host)
        joined.wait(START_S)
        log.info("ranks joined world_size=%d driver_rank=%d", self.world_size, self.driver_rank)

    def _spec(self, rank: int, address: str, store: str) -> PeerSpec:
        return PeerSpec(
            worker=self._worker,
            rank=rank,
            world_size=self.world_size,
            driver_rank=self.driver_rank,
            device=self._devices[rank],
            threads=self._threads,
            address=address,
            secret=self._secret.hex(),
            store=store,
            directory=str(self.directory) if address.startswith("unix:") else None,
        )

    def _join(self, store: Any, host: str | None) -> None:
        """In a thread that is left behind when a peer ends meanwhile: torch.distributed would wait for it."""
        from serve.ranks.join import join

        outcome: list[Exception | None] = []

        def run() -> None:
            try:
                device = self._devices[self.driver_rank]
                join(store, rank=self.driver_rank, world_size=self.world_size, device=device, host=host)
                outcome.append(None)
            except Exception as error:
                outcome.append(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=run, name="ranks-join", daemon=True).start()
        self.wait_for(lambda: bool(outcome), START_S, "torch.distributed has not joined the ranks")
        if outcome[0] is not None:
            raise self.explain(outcome[0])
        self._has_joined = True

    def _leave(self) -> None:
        from serve.ranks.join import leave

        if self._has_joined:
            leave()

    # -- the watch's thread ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        for rank, link in self._links.items():
            self._selector.register(link, selectors.EVENT_READ, rank)
        self._selector.register(self._wake, selectors.EVENT_READ)
        losses: list[Loss] = []
        until: float | None = None
        while not self._is_closing:
            timeout = None if until is None else until - time.monotonic()
            is_clear = any(loss.is_own for loss in losses) or len(losses) == len(self._links)
            if timeout is not None and (timeout <= 0 or is_clear):
                self._lose(first_cause(losses))
                return
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._wake:
                    self._wake.recv(4096)
                else:
                    losses += self._hear(key.data)
            self._flush()
            if losses and until is None:
                until = time.monotonic() + LAST_WORDS_S

    def _hear(self, rank: int) -> list[Loss]:
        """Take what a peer sent; its loss, if that was it."""
        process = self._processes[rank]
        try:
            for kind, body in self._links[rank].take():
                if kind == Kind.ERROR:
                    self._selector.unregister(self._links[rank])
                    return [Loss.from_words(rank, process.name, body)]
                with self._changed:
                    if kind != Kind.REPLY or self._replies is None:
                        raise LinkClosed(f"it sent a frame of kind {kind}, which nobody asked for")
                    self._replies.add(rank, body)
                    self._changed.notify_all()
        except (LinkClosed, OSError, ValueError, KeyError) as error:
            self._selector.unregister(self._links[rank])
            return [Loss(rank, process.name, process.wait(LAST_WORDS_S) or str(error))]
        return []

    def _flush(self) -> None:
        """Send what sockets did not take at once, and watch those that still do not."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, Link):
                with contextlib.suppress(OSError):  # its end is read, too
                    is_empty = key.fileobj.flush()
                    events = selectors.EVENT_READ if is_empty else selectors.EVENT_READ | selectors.EVENT_WRITE
                    self._selector.modify(key.fileobj, events, key.data)

    def _lose(self, cause: Loss) -> None:
        error = cause.to_error()
        for process in self._processes.values():
            process.kill()
        with self._changed:
            if self._is_closing:
                return
            self.failure = error
            on_death = self._on_death
            self._changed.notify_all()
        shutil.rmtree(self.directory, ignore_errors=True)
        if on_death is not None:
            on_death(error)
