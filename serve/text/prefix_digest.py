"""Which prefixes a replica has cached, in a form small enough to be pushed: the first 8 bytes of each block's hash.

The cache tells what is published and what is evicted, on the engine's thread; each gateway's session asks what has
changed since it last asked. A change is remembered for a while; who asks later gets the whole set.

A block of 16 positions costs 8 bytes when it is computed and 8 when it is evicted, so a replica that computes 10 000
positions a second pushes at most 10 kB/s to each gateway, and 512 kB once, when a gateway connects to a full digest.
Two of `MAX_KEYS` prefixes have equal keys once in 10^10 sets; routing then takes one for the other, and no more.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from itertools import islice

KEY_BYTES = 8
MAX_KEYS = 1 << 16
"""A million positions in blocks of 16. What is published beyond that is not told until something is evicted: what is
left out are the newest prefixes, not the roots that the others need."""
MAX_CHANGES = 1 << 14
"""A second of 250 000 positions: reports come ten times a second."""


@dataclass(frozen=True, slots=True)
class DigestChange:
    """From one state to a later one, keys end to end. `is_whole`: from nothing."""

    mark: int
    is_whole: bool
    added: bytes
    removed: bytes


class PrefixDigest:
    """`add` and `discard` on the engine's thread, `since` on any."""

    def __init__(self, block_size: int, max_keys: int = MAX_KEYS, max_changes: int = MAX_CHANGES):
        self.block_size = block_size
        self._max_keys = max_keys
        self._lock = threading.Lock()
        self._keys: set[bytes] = set()
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=max_changes)
        """(key, whether it came), oldest first."""
        self._num_changes = 0

    def add(self, block_hash: bytes) -> None:
        """The block can be found from now on."""
        self._change(block_hash[:KEY_BYTES], comes=True)

    def discard(self, block_hash: bytes) -> None:
        """The block is evicted."""
        self._change(block_hash[:KEY_BYTES], comes=False)

    def since(self, mark: int | None) -> DigestChange | None:
        """What has changed since the state called `mark` (None: nothing was told yet); None when nothing has."""
        with self._lock:
            num_new = self._num_changes - (mark or 0)
            if mark is None or num_new > len(self._changes):
                return DigestChange(self._num_changes, True, b"".join(self._keys), b"")
            if not num_new:
                return None
            last = dict(islice(self._changes, len(self._changes) - num_new, None))
        added, removed = (b"".join(key for key, comes in last.items() if comes is kind) for kind in (True, False))
        return DigestChange((mark or 0) + num_new, False, added, removed)

    def _change(self, key: bytes, *, comes: bool) -> None:
        with self._lock:
            if comes == (key in self._keys) or (comes and len(self._keys) >= self._max_keys):
                return
            (self._keys.add if comes else self._keys.discard)(key)
            self._changes.append((key, comes))
            self._num_changes += 1
