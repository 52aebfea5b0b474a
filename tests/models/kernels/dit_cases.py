"""Diffusion transformers with fused blocks, by Triton's interpreter: diffusers' outputs, in fewer launches."""

from __future__ import annotations

import copy
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

random = torch.Generator().manual_seed(0)
TIMES = torch.tensor([700.0, 20.0, 333.0])


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=random)


def inputs_of_dit() -> dict[str, Any]:
    return {"hidden_states": draw(3, 4, 16, 16), "timestep": TIMES, "class_labels": torch.tensor([1, 2, 1000])}


def inputs_of_sd3() -> dict[str, Any]:
    return {
        "hidden_states": draw(3, 4, 16, 12), "timestep": TIMES,
        "encoder_hidden_states": draw(3, 9, 64), "pooled_projections": draw(3, 64),
    }  # fmt: skip


def inputs_of_flux() -> dict[str, Any]:
    return {
        "hidden_states": draw(3, 12, 16), "timestep": TIMES / 1000, "guidance": torch.tensor([3.5, 1.0, 7.0]),
        "encoder_hidden_states": draw(3, 9, 32), "pooled_projections": draw(3, 32),
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, (make, make_inputs, lists) in CASES.items():
        transformer, inputs = make(), make_inputs()
        with torch.no_grad():
            expected = transformer(**inputs).sample
            before = [num_launches(transformer, inputs, blocks) for blocks in lists]
            fused = copy.deepcopy(transformer)
            fuse_blocks(fused)
            out = fused(**inputs).sample
        # float32, values of size one, sums over at most 128 features in another order.
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        after = [num_launches(fused, inputs, blocks) for blocks in lists]
        assert all(few < many for few, many in zip(after, before)), (before, after)
        print(f"equal: {name}, launches of a block {before} -> {after}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_dit(save(flux_pipeline(), Path(scratch) / "flux"), device=torch.device("cpu"))
    assert isinstance(loaded, StockPipeline)
    block = loaded._pipeline.transformer.transformer_blocks[0]
    assert "forward" in vars(block), "a stock pipeline's blocks are left as they are"
