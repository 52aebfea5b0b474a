"""A gateway's copy of a replica's digest of cached prefixes (`serve/text/prefix_digest.py`), and a prompt's keys."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from serve.text.kv_cache import extend_chain
from serve.text.prefix_digest import KEY_BYTES


class PrefixView:
    """The keys of the blocks that the replica has, as of its last report."""

    def __init__(self) -> None:
        self.block_size = 0
        """0: nothing is cached there, or nothing was told yet."""
        self.keys: set[int] = set()

    def change(self, block_size: int, *, is_whole: bool, added: bytes, removed: bytes) -> None:
        """Raises ValueError for what is not whole keys."""
        if is_whole:
            self.keys.clear()
        self.block_size = block_size
        self.keys.difference_update(array("Q", removed))
        self.keys.update(array("Q", added))


def prompt_keys(token_ids: Sequence[int], block_size: int, salt: str) -> list[int]:
    """Of the prompt's full blocks that a cache could answer: never the last position, which is always computed."""
    hashes: list[bytes] = []
    extend_chain(hashes, token_ids[: len(token_ids) - 1], block_size, salt)
    return [int.from_bytes(key[:KEY_BYTES], sys.byteorder) for key in hashes]
