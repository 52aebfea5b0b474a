"""Grammars in the sampler: tokens that may not come next get -inf, before anything that filters.

A row whose grammar has no legal token left stays unmasked: its token is not used, its job fails when the step is
settled (`Sequence.append`), and its mates never see a row of nothing but -inf.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
import torch

from serve.text.sequence import Row
from serve.transfer import copy_to_device, to_device


def packed_masks(rows: Seq[Row]) -> tuple[list[int], np.ndarray]:
    """Rows whose grammars rule something out after their drafts, or their newest token, and for each a bit a token, set
    where it may come next: [rows, bytes], the lowest bit first."""
    at: list[int] = []
    masks: list[bytes] = []
    for i, row in enumerate(rows):
        if row.job.matcher is None:
            continue
        mask = row.job.matcher.mask(row.drafts if row.newest is None else [row.newest])
        if mask is not None:
            at.append(i)
            masks.append(mask)
    packed = np.frombuffer(bytearray().join(masks), dtype=np.uint8)
    return at, packed.reshape(len(at), -1) if at else packed.reshape(0, 1)


def mask_tokens_(scores_RV: torch.Tensor, rows: Seq[Row]) -> None:
    """Overwrite the scores of tokens that may not come next."""
    at, packed = packed_masks(rows)
    if not at:
        return
    vocab_size, device = scores_RV.shape[1], scores_RV.device
    if device.type == "cpu":
        allowed_RV = torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little").view(np.bool_))
    else:  # an eighth of the bytes to copy
        bits = torch.arange(8, dtype=torch.uint8, device=device)
        packed_RB = copy_to_device(torch.from_numpy(packed), device)
        allowed_RV = (packed_RB[:, :, None] >> bits & 1).flatten(1)[:, :vocab_size].bool()
    if len(at) == len(rows):
        scores_RV.masked_fill_(~allowed_RV, -math.inf)
    else:
        index = to_device(at, device)
        scores_RV[index] = scores_RV[index].masked_fill_(~allowed_RV, -math.inf)
