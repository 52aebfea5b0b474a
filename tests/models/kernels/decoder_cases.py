"""The decoder with its kernels, by Triton's interpreter: transformers' logits, and what a layer launches."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import torch
from launches import counted_launches
from paged import PagedModel
from tiny import tiny_model

from models.registry import load_text_model

CPU = torch.device("cpu")


def layer_launches(model) -> Counter[str]:
    """Of one layer in a step of decodes: what two layers launch more than one."""
    paged, layers = PagedModel(model, "triton"), model._layers
    paged.forward({name: [1] for name in "abcd"})  # the first compiles what later ones may need
    counts = []
    for number in (1, 2):
        model._layers = layers[:1] * number
        with counted_launches() as launched:
            paged.forward({name: [1] for name in "abcd"})
        counts.append(launched)
    model._layers = layers
    return counts[1] - counts[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for family in ("llama", "qwen3"):
        theirs = tiny_model(family)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            model = load_text_model(Path(folder), device=CPU)
            half = load_text_model(Path(folder), device=CPU, dtype=torch.bfloat16)
        ids = torch.randint(0, 256, (13,), generator=torch.Generator().manual_seed(0)).tolist()
        ours = PagedModel(model, "triton")
        torch.testing.assert_close(
            torch.cat([ours.step({"a": ids[:9]})["a"], ours.step({"a": ids[9:]})["a"]]),
            theirs(torch.tensor([ids])).logits[0],
            atol=2e-5,
            rtol=1e-5,
        )
        print(f"{family} equal; a layer launches", *sorted(layer_launches(half).elements()), flush=True)
