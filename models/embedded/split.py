"""Which items are for training and which are held out.

An item is what a model could learn by heart: a pair of operands, a list of words, a name. Its key is hashed, one tenth
of all keys is held out, and generators draw until the key is on the side they were asked for. No list of items is
stored, so nothing can drift: the same rule decides in training, in evaluation and in the test that proves the two
sides disjoint.
"""

import hashlib
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_IN = 10
"""One key in this many is held out."""


def split_of(key: str) -> Split:
    """The side a key belongs to. Keys are compared without case, since `Ada` and `ada` are the same name."""
    digest = hashlib.sha256(key.lower().encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0 else "train"


def product_split(a: int, b: int) -> Split:
    """Products up to twelve are a table, which has to be seen: all products with the larger factor first are. Held out
    are pairs in the other order, and the answer to those swaps the factors before it looks the product up."""
    return "held_out" if a < b and split_of(f"mul:{a}:{b}") == "held_out" else "train"
