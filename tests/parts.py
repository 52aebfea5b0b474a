"""What ranks of a test compute of diffusion transformers, and how much they send meanwhile. No pytest in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.dit.base import Conditioning
from models.dit.grid import Grid, Split
from models.dit.registry import load_part

CPU = torch.device("cpu")
Call = tuple[Tensor, Tensor, list[dict[str, Tensor]]]
"""Latents, times, and the tensors of every row."""


@dataclass
class Case:
    """A model, how it is split, and what it is asked."""

    folder: Path
    split: Split
    calls: Sequence[Call]
    load_format: str = "auto"


@dataclass
class Computed:
    """By one rank."""

    outputs: list[Tensor | None]
    bytes_read: int
    weight_bytes: int
    num_parameters: int
    num_parameters_elsewhere: int
    sent: dict[str, int]
    """Kind of exchange → bytes handed to others, in all calls; of a sum its terms."""


def compute(rank: int, cases: Sequence[Case]) -> list[Computed]:
    """For `run_ranks`; all cases are split over all ranks."""
    return [_compute(rank, case) for case in cases]


def ask(model: Any, sizes: Sequence[tuple[int, int]], prompts: Sequence[str], rows: Sequence[int]) -> list[Call]:
    """Calls of so many rows of each size, every row at its own time, prompts in turn."""
    generator = torch.Generator().manual_seed(1)
    encoded = model.encode(prompts)
    calls = []
    for size in sizes:
        for num_rows in rows:
            latents = torch.randn(num_rows, *model.latent_shape(*size), generator=generator)
            times = torch.rand(num_rows, generator=generator) * 1000
            calls.append((latents, times, [dict(encoded[i % len(encoded)].tensors) for i in range(num_rows)]))
    return calls


def whole(model: Any, calls: Sequence[Call]) -> list[Tensor]:
    """One rank's answers."""
    with torch.inference_mode():
        return [model.predict(latents, times, conditioning(rows)) for latents, times, rows in calls]


def conditioning(rows: Sequence[dict[str, Tensor]]) -> list[Conditioning]:
    return [Conditioning(tensors, num_tokens=0) for tensors in rows]


def largest_error(outputs: Sequence[Tensor | None], expected: Sequence[Tensor]) -> float:
    """As a share of the largest number in each."""
    errors = []
    for output, right in zip(outputs, expected, strict=True):
        assert output is not None and output.shape == right.shape
        errors.append(float((output - right).abs().max() / right.abs().max()))
    return max(errors)


@dataclass
class _Counted:
    """A process group that notes what is sent through it."""

    group: Any
    sent: dict[str, int]
    name: str

    def alltoall_base(self, received: Tensor, sent: Tensor, out: list[int], into: list[int]) -> Any:
        own = into[self.group.rank()] if into else len(sent) // self.group.size()
        self._note((sent.numel() - own) * sent.element_size())
        return self.group.alltoall_base(received, sent, out, into)

    def _allgather_base(self, received: Tensor, sent: Tensor) -> Any:
        self._note(sent.nbytes)
        return self.group._allgather_base(received, sent)

    def _note(self, num_bytes: int) -> None:
        self.sent[self.name] = self.sent.get(self.name, 0) + num_bytes


def _compute(rank: int, case: Case) -> Computed:
    sent: dict[str, int] = {}
    grid = Grid.join(case.split, rank)
    grid = replace(
        grid,
        shards=replace(grid.shards, tensor_group=_Counted(grid.shards.tensor_group, sent, "sums")),
        mates=_Counted(grid.mates, sent, "tokens"),
        leads=_Counted(grid.leads, sent, "rows"),
    )
    part = load_part(case.folder, grid, device=CPU, load_format=case.load_format)
    with torch.inference_mode():
        outputs = [part.predict(latents, times, conditioning(rows)) for latents, times, rows in case.calls]
    num = sum(parameter.numel() for parameter in part.transformer.parameters())
    return Computed(outputs, part.bytes_read, part.weight_bytes, num, part.num_parameters_elsewhere, sent)
