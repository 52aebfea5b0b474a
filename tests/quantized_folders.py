"""Checkpoints laid out as public quantised ones are (tensors, dtypes, order of packed values, `quantization_config`),
made of a float checkpoint; and beside each the float checkpoint of what its numbers stand for, for comparison.

Written from the documentation of the formats and independent of `models/quantized`: values are packed one by one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Of a weight [E, D]: the tensors stored for it, by the ends of their names, and the weight that they stand for."""

FP8 = torch.float8_e4m3fn


def fp8_blocks(
    weight: torch.Tensor, scale_name: str = "weight_scale_inv", side: int = 128
) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek-V3, Qwen3-FP8: blocks of 128 x 128, those at the edges cut short."""
    num_rows, num_columns = (-(-size // side) for size in weight.shape)
    scale, values, dequantized = torch.empty(num_rows, num_columns), torch.empty_like(weight, dtype=FP8), weight.clone()
    for row in range(num_rows):
        for column in range(num_columns):
            at = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            scale[row, column] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scale[row, column]).to(FP8)
            dequantized[at] = values[at].float() * scale[row, column]
    return {"weight": values, scale_name: scale}, dequantized


def fp8_tensor(*shape: int) -> Writer:
    """With static activations: one scale, and one for the activations, both of `shape`."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = weight.abs().max() / 448
        values = (weight / scale).to(FP8)
        stored = {"weight": values, "weight_scale": scale.reshape(shape), "input_scale": torch.full(shape, 0.02)}
        return stored, values.float() * scale

    return write


def fp8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """FP8-dynamic: scales in bfloat16."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight / scale.float()).clamp(-448, 448).to(FP8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale.float()


def int8_rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """quantized.w8a8."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def packed(bits: int, group: int | None, *, has_zero: bool = False) -> Writer:
    """quantized.w4a16, quantized.w8a16: `pack-quantized`."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        grouped = weight.unflatten(1, (-1, group or weight.shape[1]))
        least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if has_zero:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scale = (high - low) / (most - least)
            zero = (least - low / scale).round().clamp(least, most)
        else:
            scale, zero = grouped.abs().amax(-1) / most, torch.zeros(grouped.shape[:2])
        values = (grouped / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(least, most)
        dequantized = ((values - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
        stored = {
            "weight_packed": pack(values.flatten(1).int(), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if has_zero:
            stored["weight_zero_point"] = pack(zero.int().t(), bits).t().contiguous()
        return stored, dequantized

    return write


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of numbers with a sign, 32 / bits to an int32: 2^(bits - 1) more, the first in the lowest bits."""
    each, rows = 32 // bits, []
    for row in values.tolist():
        row += [-(1 << (bits - 1))] * (-len(row) % each)
        words = []
        for at in range(0, len(row), each):
            word = sum((value + (1 << (bits - 1))) << (bits * place) for place, value in enumerate(row[at : at + each]))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def group_of(
    strategy: str, *, kind: str = "int", bits: int = 8, symmetric: bool = True, **others: Any
) -> dict[str, Any]:
    """compressed-tensors' `weights`."""
    return {
        "num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False,
        "group_size": None, "block_structure": None, "actorder": None, "observer": "minmax", **others,
    }  # fmt: skip


def compressed(format: str, weights: dict[str, Any], *, dynamic: bool | None = None, **others: Any) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`; `dynamic`: of activations, None for none."""
    activations = None if dynamic is None else {"num_bits": 8, "type": weights["type"], "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group}, **others,
    }  # fmt: skip


FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "fp8 in blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        fp8_blocks,
    ),
    "fp8 by tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor()),
    "compressed fp8 by row": (compressed("float-quantized", group_of("channel", kind="float"), dynamic=True), fp8_rows),
    "compressed fp8 by tensor": (
        compressed("float-quantized", group_of("tensor", kind="float"), dynamic=False), fp8_tensor(1),
    ),
    "compressed fp8 in blocks": (
        compressed("float-quantized", group_of("block", kind="float", block_structure=[128, 128]), dynamic=True),
        lambda weight: fp8_blocks(weight, "weight_scale"),
    ),
    "compressed int8 by row": (compressed("int-quantized", group_of("channel"), dynamic=True), int8_rows),
    "packed int8 by row": (compressed("pack-quantized", group_of("channel")), packed(8, None)),
    "packed int8 in groups": (compressed("pack-quantized", group_of("group", group_size=64)), packed(8, 64)),
    "packed int4 in groups": (compressed("pack-quantized", group_of("group", bits=4, group_size=128)), packed(4, 128)),
    "packed int4 with zero points": (
        compressed("pack-quantized", group_of("group", bits=4, group_size=32, symmetric=False)),
        packed(4, 32, has_zero=True),
    ),
    "packed int4 by row": (compressed("pack-quantized", group_of("channel", bits=4)), packed(4, None)),
}  # fmt: skip


def quantized_folder(source: Path, name: str, path: Path) -> tuple[Path, Path]:
    """From the float checkpoint `source`, below `path`: the quantised one, and the float one that it stands for."""
    config, write = FORMATS[name]
    quantized, dequantized = path / "quantized", path / "dequantized"
    for folder in (quantized, dequantized):
        shutil.copytree(source, folder)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        plain[key] = tensor
        if key.endswith("_proj.weight"):
            tensors, plain[key] = write(tensor.float())
            stored |= {key.removesuffix("weight") + end: each.contiguous() for end, each in tensors.items()}
        else:
            stored[key] = tensor
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dequantized / "model.safetensors", metadata={"format": "pt"})
    change_config(quantized, quantization_config=config)
    return quantized, dequantized


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
