"""Verifies draft tokens: what the target model draws in their places decides how many hold.

A step gives logits after every draft, as if those before it were right. From each a token is drawn, and a draft holds
when the token drawn in its place is the draft itself. So a row's output is its draws up to the first that differs: the
accepted drafts, and one token that the target drew itself.
"""

from __future__ import annotations

from collections.abc import Sequence


def until_rejected(drawn: Sequence[int], drafts: Sequence[int]) -> tuple[int, ...]:
    """The draws that stand: one more than the drafts that hold. `drawn` has one more token than `drafts`."""
    num_accepted = 0
    while num_accepted < len(drafts) and drawn[num_accepted] == drafts[num_accepted]:
        num_accepted += 1
    return tuple(drawn[: num_accepted + 1])
