"""The shape of FLUX.1-dev's transformer: its step's time and operations. Text encoders and VAE are left out.

Nineteen blocks with weights of their own for image and text, thirty-eight where both are one stream; each token passes
57 blocks of twelve matrices of the model's width squared, and all tokens attend to all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu.bench import Bench
from loadtest.gpu.limits import DeviceLimits
from loadtest.gpu.timing import Stopwatch
from models.kernels.available import has_kernels

TEXT_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxShape:
    num_double: int = 19
    num_single: int = 38
    num_heads: int = 24
    head_dim: int = 128
    text_width: int = 4096
    pooled_width: int = 768
    side: int = 1024
    """Pixels; a token is 16 x 16 of them."""
    text_tokens: int = TEXT_TOKENS

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def image_tokens(self) -> int:
        return (self.side // 16) ** 2

    @property
    def row_flop(self) -> float:
        """Of one row's forward: linear layers and attention. Modulation and embeddings are less than a thousandth."""
        tokens, blocks = self.image_tokens + self.text_tokens, self.num_double + self.num_single
        return float(blocks * (2 * 12 * self.width**2 * tokens + 4 * tokens**2 * self.width))

    @property
    def config(self) -> dict[str, Any]:
        """Of diffusers' `FluxTransformer2DModel`."""
        third = self.head_dim // 8
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": self.num_double,
            "num_single_layers": self.num_single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.num_heads,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": True,
            "axes_dims_rope": [2 * third, (self.head_dim - 2 * third) // 2, (self.head_dim - 2 * third) // 2],
        }


DEV = FluxShape()
TINY = FluxShape(
    num_double=1, num_single=1, num_heads=2, head_dim=16, text_width=32, pooled_width=16, side=64, text_tokens=8
)


def measure(bench: Bench, limits: DeviceLimits, folder: Path, rows_of_steps: tuple[int, ...]) -> None:
    """One row for each number of rows, with diffusers' blocks, then with ours where there are kernels for them."""
    shape = TINY if bench.is_rehearsal else DEV
    dtype = torch.float32 if bench.is_rehearsal else torch.bfloat16
    transformer = load(folder, shape, bench.device, dtype)
    for how in ("diffusers' blocks", "fused blocks"):
        if how == "fused blocks" and not _fuse(transformer):
            bench.note("FLUX with fused blocks: there are no kernels for them here")
            return
        for rows in rows_of_steps:
            if bench.has_time(f"FLUX, {how}, {rows} rows", 0 if bench.is_rehearsal else 4 + 2 * rows):
                _measure(bench, limits, shape, dtype, transformer, how, rows)


def _measure(
    bench: Bench,
    limits: DeviceLimits,
    shape: FluxShape,
    dtype: torch.dtype,
    transformer: Any,
    how: str,
    rows: int,
) -> None:
    inputs = example(shape, rows, bench.device, dtype)
    stopwatch = Stopwatch(bench.device, seconds=1.5, empties_cache=False)
    with torch.inference_mode():
        step_s = stopwatch(lambda: transformer(**inputs, return_dict=False)).median_s
    bench.row(
        "images",
        model=f"FLUX.1-dev shape {shape.side}x{shape.side}",
        how=how,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        step_ms=1e3 * step_s,
        matmul_share=rows * shape.row_flop / step_s / limits.matmul_flop_s,
        row_steps_s=rows / step_s,
        steps=28,
        images_s=rows / (28 * step_s),
    )


def _fuse(transformer: Any) -> bool:
    from models.dit.fused_blocks import fuse_blocks

    if not has_kernels(transformer.device):
        return False
    fuse_blocks(transformer)
    return True


def load(folder: Path, shape: FluxShape, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with random weights, by way of a pipeline that has nothing else."""
    from models.dit.checkpoint import load_pipeline, read_index

    absent = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor")
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **{name: [None, None] for name in absent},
    }
    for name, values in {
        "model_index.json": index,
        "transformer/config.json": shape.config,
        "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return load_pipeline(read_index(folder), device=device, dtype=dtype, load_format="dummy").transformer


def example(shape: FluxShape, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of a forward as the pipeline gives them."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=dtype)

    side = shape.side // 16
    grid = torch.zeros(side, side, 3, device=device, dtype=dtype)
    grid[..., 1] += torch.arange(side, device=device, dtype=dtype)[:, None]
    grid[..., 2] += torch.arange(side, device=device, dtype=dtype)[None, :]
    return {
        "hidden_states": random(rows, shape.image_tokens, 64),
        "encoder_hidden_states": random(rows, shape.text_tokens, shape.text_width),
        "pooled_projections": random(rows, shape.pooled_width),
        "timestep": torch.full((rows,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((rows,), 3.5, device=device, dtype=torch.float32),
        "img_ids": grid.reshape(-1, 3),
        "txt_ids": torch.zeros(shape.text_tokens, 3, device=device, dtype=dtype),
    }
