"""Diffusion transformers with fused blocks: diffusers' outputs, in fewer launches.

TRITON_INTERPRET=1 python dit_cases.py           on CPU, by the interpreter; launches are counted
python dit_cases.py                              compiled, where there is a GPU
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from launches import counted_launches
from tiny_pipelines import dit_pipeline, finish, flux_pipeline, save, sd3_pipeline

from models.dit.fused_blocks import fuse_blocks
from models.dit.pipeline import StockPipeline
from models.dit.registry import load_dit

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
random = torch.Generator().manual_seed(0)
TIMES = torch.tensor([700.0, 20.0])


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=random)


def inputs_of_dit() -> dict[str, Any]:
    return {"hidden_states": draw(2, 4, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 1000])}


def inputs_of_sd3() -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 8, 6), "timestep": TIMES,
        "encoder_hidden_states": draw(2, 9, 64), "pooled_projections": draw(2, 64),
    }  # fmt: skip


def inputs_of_flux() -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 12, 16), "timestep": TIMES / 1000, "guidance": torch.tensor([3.5, 1.0]),
        "encoder_hidden_states": draw(2, 9, 32), "pooled_projections": draw(2, 32),
        "txt_ids": torch.zeros(9, 3), "img_ids": draw(12, 3).round(),
    }  # fmt: skip


def sd3_with_dual_attention() -> SD3Transformer2DModel:
    pipeline = sd3_pipeline()
    config = dict(pipeline.transformer.config) | {"dual_attention_layers": (0,), "_use_default_values": []}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    return finish(pipeline).transformer


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "dit": (lambda: dit_pipeline().transformer, inputs_of_dit, ("transformer_blocks",)),
    "sd3": (lambda: sd3_pipeline().transformer, inputs_of_sd3, ("transformer_blocks",)),
    "sd3.5": (sd3_with_dual_attention, inputs_of_sd3, ("transformer_blocks",)),
    "flux": (
        lambda: flux_pipeline().transformer, inputs_of_flux, ("transformer_blocks", "single_transformer_blocks")
    ),
}  # fmt: skip


def num_launches(transformer: Any, inputs: dict[str, Any], blocks: str) -> int:
    """Of the first block in the list of that name: what it adds once more."""
    longer = copy.deepcopy(transformer)
    getattr(longer, blocks).insert(0, getattr(longer, blocks)[0])
    counts = []
    for one in (transformer, longer):
        with counted_launches() as launched:
            one(**inputs)
        counts.append(launched.total())
    return counts[1] - counts[0]


def compare(name: str) -> None:
    make, make_inputs, lists = CASES[name]
    transformer, inputs = make(), make_inputs()
    fused = copy.deepcopy(transformer).to(DEVICE)
    fuse_blocks(fused)
    with torch.no_grad():
        expected = transformer(**inputs).sample
        out = fused(**{name: tensor.to(DEVICE) for name, tensor in inputs.items()}).sample.cpu()
    # float32, values of size one, sums over at most 128 features in another order, those of products too on a GPU.
    torch.testing.assert_close(out, expected, atol=1e-5 if IS_INTERPRETED else 1e-4, rtol=1e-5)
    print(f"equal: {name}", flush=True)
    if IS_INTERPRETED:
        before, after = ([num_launches(one, inputs, blocks) for blocks in lists] for one in (transformer, fused))
        assert all(few < many for few, many in zip(after, before)), (before, after)
        print(f"launches of a block: {before} -> {after}", flush=True)


def check_stock_pipelines() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_dit(save(flux_pipeline(), Path(scratch) / "flux"), device=DEVICE)
    assert isinstance(loaded, StockPipeline)
    block = loaded._pipeline.transformer.transformer_blocks[0]
    assert "forward" in vars(block), "a stock pipeline's blocks are left as they are"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CASES:
        compare(name)
    check_stock_pipelines()
