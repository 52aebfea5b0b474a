"""What the ranks of a split model compute, for tests that compare it with one rank: a rank function and its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from paged import PagedModel

from models.parallel import ALONE, Place
from models.registry import load_text_model

CPU = torch.device("cpu")


def logits_of(folder: Path, place: Place = ALONE, *, attention: str = "cpu", **options: Any) -> Any:
    """Logits of a prompt in two chunks beside another, then of decodes of both; None on stages without them."""
    model = load_text_model(folder, device=CPU, place=place, **options)
    paged = PagedModel(model, attention)
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randint(0, model.spec.vocab_size, (2, 40), generator=generator).tolist()
    steps = [{"a": first[:17]}, {"b": second[:9], "a": first[17:30]}]
    steps += [{"a": [first[at]], "b": second[at - 21 : at - 20]} for at in range(30, 34)]
    if not place.is_last:
        for step in steps:
            paged.forward(step)
        return None
    return torch.cat([logits for step in steps for logits in paged.step(step).values()])


def rank_logits(rank: int, tensor_size: int, num_stages: int, models: list[tuple[Path, dict[str, Any]]]) -> list[Any]:
    """`logits_of` every model: its folder and how it is loaded."""
    place = Place.join(rank, tensor_size=tensor_size, num_stages=num_stages)
    results = [logits_of(folder, place, **options) for folder, options in models]
    place.flush()
    return results
