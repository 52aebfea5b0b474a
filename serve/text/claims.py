"""Who is computing which cache block right now, and who waits for it.

Requests that arrive together often share a prefix (a system prompt) that none of them has computed yet. The first to be
admitted claims the hashes of its prompt's full blocks; a later one that needs a claimed block is parked until the last
block they share is published, instead of computing it a second time. It loses nothing: the owner is ahead of it.

Only running sequences own claims and they wait for nobody, so there is no cycle. A parked sequence is woken when the
block is published, by whomever, or when its owner gives up (finished, preempted, removed); it then looks again.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from serve.text.sequence import Sequence


class Claims:
    """Block hashes in computation, each with one owner, and the sequences parked for them."""

    def __init__(self) -> None:
        self._owners: dict[bytes, Sequence] = {}
        self._waiters: dict[bytes, list[Sequence]] = {}
        self._waits_for: dict[Sequence, bytes] = {}

    def __len__(self) -> int:
        """The number of parked sequences."""
        return len(self._waits_for)

    def claim(self, seq: Sequence, hashes: Iterable[bytes]) -> None:
        """`seq` is going to compute these blocks. What another one computes already stays its own."""
        for key in hashes:
            self._owners.setdefault(key, seq)

    def park(self, seq: Sequence, hashes: Seq[bytes], start: int) -> int:
        """Let `seq` wait for the blocks that are being computed of `hashes[start:]`: until so many of `hashes` exist.
        0 when the first is not."""
        end = start
        while end < len(hashes) and hashes[end] in self._owners:
            end += 1
        if end == start:
            return 0
        key = self._waits_for[seq] = hashes[end - 1]
        self._waiters.setdefault(key, []).append(seq)
        return end

    def unpark(self, seq: Sequence) -> bool:
        """False when it was not parked."""
        key = self._waits_for.pop(seq, None)
        if key is None:
            return False
        waiters = self._waiters[key]
        waiters.remove(seq)
        if not waiters:
            del self._waiters[key]
        return True

    def published(self, key: bytes) -> list[Sequence]:
        """The block exists now. Returns who waited for it, no longer parked."""
        self._owners.pop(key, None)
        return self._wake(key)

    def give_up(self, seq: Sequence, hashes: Iterable[bytes]) -> list[Sequence]:
        """`seq` will not compute these blocks. Returns who waited for those that were its own, no longer parked."""
        woken: list[Sequence] = []
        for key in hashes:
            if self._owners.get(key) is seq:
                del self._owners[key]
                woken += self._wake(key)
        return woken

    def _wake(self, key: bytes) -> list[Sequence]:
        waiters = self._waiters.pop(key, [])
        for seq in waiters:
            del self._waits_for[seq]
        return waiters
