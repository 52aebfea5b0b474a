"""Which replicas there are, and telling those who follow: all of them once, then what changes.

A change is encoded once, however many follow, and holds what came and what is gone since the last one: with a thousand
replicas and a hundred gateways the whole list would be 30 MB for each replica that comes up. Changes of one turn of
the event loop go together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve import wire
from serve.recorder import Recorder
from serve.wire import ReplicaEntry

Tell = Callable[[bytes], None]
"""Send an encoded frame."""


class Registry:
    """The hub's. `tandem_replicas` of its recorder follows."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._entries: dict[str, ReplicaEntry] = {}
        self._followers: set[Tell] = set()
        self._changed: dict[str, None] = {}
        """Replicas of which followers have not been told yet."""

    def entries(self) -> list[ReplicaEntry]:
        """By id."""
        return sorted(self._entries.values(), key=lambda entry: entry.replica_id)

    def put(self, entry: ReplicaEntry) -> None:
        """The replica is coming, or can be reached from now on."""
        self._entries[entry.replica_id] = entry
        self._note(entry)

    def remove(self, entry: ReplicaEntry) -> None:
        """It is gone, unless another process has taken its id since."""
        if self._entries.get(entry.replica_id) == entry:
            del self._entries[entry.replica_id]
            self._note(entry)

    def follow(self, tell: Tell) -> None:
        """`tell` all there is now, and each change."""
        self._followers.add(tell)
        tell(wire.encode(wire.Entries(self.entries())))

    def unfollow(self, tell: Tell) -> None:
        self._followers.discard(tell)

    def _note(self, entry: ReplicaEntry) -> None:
        model = entry.model
        num_ready = sum([each.model == model and each.address != "" for each in self._entries.values()])
        self._recorder.admit(model)
        self._recorder.set("tandem_replicas", num_ready, model=model)
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._tell_changes)
        self._changed[entry.replica_id] = None

    def _tell_changes(self) -> None:
        came = [self._entries[name] for name in self._changed if name in self._entries]
        gone = [name for name in self._changed if name not in self._entries]
        self._changed = {}
        if self._followers:
            change = wire.encode(wire.Change(came, gone))
            for tell in self._followers:
                tell(change)
