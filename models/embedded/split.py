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


PRODUCT_PARTS = {6: (5, 1), 7: (5, 2), 8: (5, 3), 9: (5, 4), 11: (10, 1), 12: (10, 2)}
"""How a second factor is split in the working of a product; the others are looked up whole."""


def product_split(a: int, b: int) -> Split:
    """Products up to twelve are a table, and most of it has to be seen. Held out as questions are some with the smaller
    factor first; all with the larger first are for training."""
    return "held_out" if a < b and split_of(f"mul:{a}:{b}") == "held_out" else "train"


def sum_split(a: int, b: int) -> Split:
    """The side of a sum. One that is a step of a product is never held out, since the product's working shows it."""
    small, large = sorted((a, b))
    is_step = large <= 120 and any(large * right == small * left for left, right in PRODUCT_PARTS.values())
    return "train" if is_step else split_of(f"add:{small}:{large}")
