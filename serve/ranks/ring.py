"""A ring of message slots in memory shared by the driver, who writes, and the peers of its node, who read.

    | counters: one cache line a rank | slot 0 | slot 1 | … |

The driver writes a message once for all peers and rings each peer's bell (`link.py`); a peer counts up when it has done
what the message says. A slot is written again only when every reader has counted past it. The ring never waits: a
message that finds no free slot, or is larger than one, travels inline, so a slow peer cannot deadlock the driver.

The memory has no name: the driver hands its file descriptor to proven peers over their Unix sockets. It is freed with
the last process that maps it, however that one ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

NUM_SLOTS = 8
"""More than the batches an engine keeps in flight. Pages are taken as they are first written."""
SLOT_BYTES = 256 << 10
"""A decode step of 256 sequences takes a few KiB; a prefill of 8192 tokens takes 64."""
_CACHE_LINE = 64


class Ring:
    """The memory, mapped. The driver uses `write`, a peer `read` and `done`."""

    def __init__(self, file: int, world_size: int, readers: Sequence[int] = ()):
        """Map `file`, which may be closed afterwards. The driver names the ranks that read."""
        start = -(-world_size * _CACHE_LINE // mmap.PAGESIZE) * mmap.PAGESIZE
        size = start + NUM_SLOTS * SLOT_BYTES
        if readers:
            os.ftruncate(file, size)
        self._memory = memoryview(mmap.mmap(file, size))
        self._counters = self._memory[:start].cast("Q")
        self._readers = [rank * _CACHE_LINE // 8 for rank in readers]
        self._slots = [self._memory[at : at + SLOT_BYTES] for at in range(start, size, SLOT_BYTES)]
        self._num_written = 0

    def write(self, payload: memoryview) -> int | None:
        """The slot that holds these bytes now; None when they must travel inline."""
        number = self._num_written
        if len(payload) > SLOT_BYTES:
            return None
        counters = self._counters
        for reader in self._readers:
            if counters[reader] + NUM_SLOTS <= number:
                return None
        slot = number % NUM_SLOTS
        self._slots[slot][: len(payload)] = payload
        self._num_written = number + 1
        return slot

    def read(self, slot: int, length: int) -> memoryview:
        """The message in `slot`. Raises ValueError for what no driver writes."""
        if slot >= NUM_SLOTS or length > SLOT_BYTES:
            raise ValueError(f"a bell names slot {slot} with {length} bytes; there are {NUM_SLOTS} of {SLOT_BYTES}")
        return self._slots[slot][:length].toreadonly()

    def done(self, rank: int) -> None:
        """`rank` has used one more message of the ring."""
        self._counters[rank * _CACHE_LINE // 8] += 1
