"""What a forward reads besides weights and cache, where it reads it: ids, positions and the attention plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.attention.base import AttentionBackend, TokenLayout
from models.staging import Staging


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Of T new tokens; complete once the staging buffer they were put into is sent."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    plan: Any

    @classmethod
    def put(
        cls,
        token_ids: Sequence[int],
        positions: Sequence[int],
        layout: TokenLayout,
        attention: AttentionBackend,
        staging: Staging,
    ) -> StepInputs:
        """The first puts of a step, so that equal numbers of rows and tokens are always at the same addresses."""
        ids_T = staging.put(token_ids, torch.int64)
        positions_T = staging.put(positions, torch.int64)
        return cls(ids_T, positions_T, attention.plan(layout, staging))

    def lie_where(self, others: StepInputs) -> bool:
        """Whether whatever reads the `others` would read these."""
        return _same_place(self, others)


def _same_place(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        # Block tables are of any length, which kernels do not look at; what they were told of shapes are the strides.
        return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    if dataclasses.is_dataclass(one):
        return all(_same_place(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_same_place, one, other))
    return bool(one == other)
