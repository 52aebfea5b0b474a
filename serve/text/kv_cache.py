"""The paged KV cache's book-keeping: which block of positions belongs to whom, and which blocks hold a known prefix.

Integers only; the tensors are the runner's. A block covers `block_size` positions and is in one of three states:

    in use          num references > 0          in one block table, or in several that share a prefix or are forks
    idle, cached    on the free list, hashed    still answers for its prefix until somebody takes it
    idle, empty     on the free list            nothing worth keeping

The free list is kept in eviction order, linked through the arrays `_prev` and `_next`, so that a cached block that is
hit leaves its middle in O(1). A sequence's blocks are freed last first, so prefixes outlive what follows them; blocks
without a hash go to the front. A full block is published under SHA-256 of (parent's hash, token ids): equal hashes mean
equal prefixes, and equal salts, back to position 0. A second block with the content of one in use stays unpublished and
is not merged with it, which keeps block tables append-only.

Follows PagedAttention (Kwon et al., 2023) and vLLM's block pool, without an object per block.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256

from serve.text.prefix_digest import PrefixDigest


class KVCache:
    """A pool of blocks. Not thread-safe; the scheduler owns it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        digest: PrefixDigest | None = None,
    ):
        """`digest` hears which blocks can be found."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks is {num_blocks} and block_size {block_size}; both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

        self.num_free = num_blocks

        self.digest = digest
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        # The free list is a ring through one extra entry, its head and tail: `_next[_ring]` is evicted first.
        self._ring = num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]

    # -- hashes ----------------------------------------------------------------------------------------------------

    def extend_hashes(self, hashes: list[bytes], token_ids: Sequence[int], salt: str) -> None:
        """Append the hashes of those full blocks of `token_ids` that `hashes` does not have yet."""
        if not self.enable_prefix_caching:
            return
        extend_chain(hashes, token_ids, self.block_size, salt)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The published blocks of the longest known prefix. Nothing is taken."""
        published = self._published
        blocks: list[int] = []
        for key in hashes:
            block = published.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Let others find `block`, which is in use, full and computed, under `key`.

        When another block has the same content, the one in use answers, for it will stay longer.
        """
        holder = self._published.get(key)
        if holder is not None:
            if holder == block or self._references[holder]:
                return
            self._hashes[holder] = None
            self._unlink(holder)
            self._link(holder, before=self._next[self._ring])
        self._published[key] = block
        self._hashes[block] = key
        if self.digest is not None:
            self.digest.add(key)

    # -- blocks ----------------------------------------------------------------------------------------------------

    def allocate(self, cached: Sequence[int], num_new: int, reserve: int = 0) -> array[int] | None:
        """A new block table: the `cached` blocks shared, then `num_new` own ones. 32-bit integers side by side, which
        a step sends to the device as they lie.

        None, and nothing taken, when they do not fit or fewer than `reserve` blocks would stay free.
        """
        references = self._references
        num_idle = sum(1 for block in cached if not references[block])
        if num_idle + num_new + reserve > self.num_free:
            return None
        for block in cached:
            if not references[block]:
                self._unlink(block)
            references[block] += 1
        self.num_free -= num_idle
        blocks = array("i", cached)
        for _ in range(num_new):
            self.extend(blocks)
        return blocks

    def extend(self, blocks: array[int]) -> bool:
        """Append one own block to a block table, evicting the oldest idle one. False when none is free."""
        block = self._next[self._ring]
        if block == self._ring:
            return False
        self._unlink(block)
        key = self._hashes[block]
        if key is not None:
            del self._published[key]
            self._hashes[block] = None
            if self.digest is not None:
                self.digest.discard(key)
        self._references[block] = 1
        self.num_free -= 1
        blocks.append(block)
        return True

    def fork(self, blocks: Sequence[int]) -> array[int]:
        """A second block table with the same blocks. Who writes into a shared one needs `own_last` first."""
        for block in blocks:
            self._references[block] += 1
        return array("i", blocks)

    def own_last(self, blocks: Sequence[int]) -> array[int]:
        """The table with an own block in place of its last one, whose content the caller copies. One must be free."""
        owned = array("i", blocks[:-1])
        has_room = self.extend(owned)
        assert has_room, "no free block to copy into"
        self._references[blocks[-1]] -= 1
        assert self._references[blocks[-1]], "the last block was not shared"
        return owned

    def num_references(self, block: int) -> int:
        """How many block tables have it."""
        return self._references[block]

    def free(self, blocks: Sequence[int]) -> None:
        """Give a block table back. Published blocks stay findable until they are taken."""
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            if references[block]:
                continue
            self._link(block, before=self._next[self._ring] if self._hashes[block] is None else self._ring)
            self.num_free += 1

    def num_unshared(self, tables: Iterable[Sequence[int]]) -> int:
        """How many blocks would come free if all these block tables were given back."""
        references = self._references
        num_held = Counter(block for blocks in tables for block in blocks)
        return sum(1 for block, num in num_held.items() if references[block] == num)

    def _link(self, block: int, *, before: int) -> None:
        after = self._prev[before]
        self._next[after] = self._prev[before] = block
        self._prev[block], self._next[block] = after, before

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before


def extend_chain(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str) -> None:
    """Append the chained hashes of those full blocks of `token_ids` that `hashes` does not have yet."""
    first, end = len(hashes) * block_size, len(token_ids) - len(token_ids) % block_size
    if first == end:
        return
    parent = hashes[-1] if hashes else root_hash(salt=salt)
    data = array("i", token_ids[first:end]).tobytes()
    step = len(data) // ((end - first) // block_size)
    for i in range(0, len(data), step):
        parent = sha256(parent + data[i : i + step]).digest()
        hashes.append(parent)


def root_hash(**extras: str) -> bytes:
    """The parent of a sequence's first block: what must be equal besides the tokens for a prefix to be shared.

    Each extra enters with its name and length, so that no value can pose as another (a salt as an adapter, say).
    """
    fields = (part for name, value in sorted(extras.items()) for part in (name.encode(), value.encode()))
    return sha256(b"".join(len(part).to_bytes(4, "little") + part for part in fields)).digest()
