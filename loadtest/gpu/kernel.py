"""One kernel to be checked and timed: how its inputs are made, what computes it, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation on tensors. `reference` takes them in any precision."""

    name: str
    shape: str
    make: Callable[[], Tensors]
    """Fresh random inputs."""
    compute: Callable[..., torch.Tensor | Tensors]
    reference: Callable[..., torch.Tensor | Tensors]
    num_bytes: float
    """Each input read once, each output written once."""
    flop: float = 0.0
    """Of matrix products."""
    bound: float | None = None
    """Of the error; None: that of rounding."""
    plain: Callable[..., object] | None = None
    """What is timed beside it; None: the reference, in the inputs' own precision."""
