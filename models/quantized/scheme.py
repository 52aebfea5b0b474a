"""How the numbers of a quantised matrix are stored: their kind, and what shares a scale.

A weight is (value - zero) * scale. Scales belong to groups of input features of one output feature (a row), the largest
group being the whole row; what checkpoints scale by tensor or by block is spread over the rows it covers, 3 % of the
weights' bytes where blocks are 128 wide. So rows can be cut, joined and reordered without a look at their numbers.
No torch: what a model takes is reckoned before anything loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Values = Literal["fp8", "int8", "int4"]

USUAL_GROUPS = (128, 64, 32)
"""Input features that share a scale of int4 weights, the first of them that divides a row. Fewer are more exact and
take more memory (16 bits of scale and 16 of zero a group)."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Of one matrix."""

    values: Values
    """fp8: e4m3, with activations in e4m3 too where the device multiplies them so. int8, int4: weights only."""
    group: int | None = None
    """Input features that share a scale; None: all of a row."""
    has_zero: bool = False
    """int4 only: a zero point per group; else the values lie around 8."""

    @property
    def bits(self) -> int:
        return 4 if self.values == "int4" else 8

    def num_groups(self, in_features: int) -> int:
        """In a row."""
        return 1 if self.group is None else -(-in_features // self.group)

    def num_bytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        """Of a matrix with its scales. `itemsize`: of an activation, in whose dtype int4 has scales and zero points."""
        shared = 2 * itemsize if self.values == "int4" else 4
        return out_features * (in_features * self.bits // 8 + self.num_groups(in_features) * shared)

    def fitted(self, in_features: int) -> Scheme:
        """With groups of a usual size that divide a row, where these do not and others do."""
        if self.group is None or in_features % self.group == 0:
            return self
        fitting = [size for size in USUAL_GROUPS if in_features % size == 0]
        return replace(self, group=fitting[0]) if fitting else self

    def __str__(self) -> str:
        shared = "a row" if self.group is None else f"{self.group} features"
        return f"{self.values}, a scale for {shared}"


ON_LOAD = {
    "fp8": Scheme("fp8"),
    "int8": Scheme("int8"),
    "int4": Scheme("int4", USUAL_GROUPS[0], has_zero=True),
}
"""By the values of the option `quantization`."""
