"""The fused kernels stay within their stated errors by Triton's interpreter, and compile for Hopper without spills."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sm90 import compile_for_sm90

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the CUDA kernels stay unchecked"
)


def run(script: str) -> str:
    """In a process of its own: Triton reads the variable when it is first imported, and others may have done that."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    command = [sys.executable, Path(__file__).with_name(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kernels_stay_within_their_stated_errors_by_the_interpreter() -> None:
    assert run("kernel_cases.py").count("within bounds") == 4


def test_a_decoder_with_kernels_equals_transformers_and_launches_ten_a_layer() -> None:
    said = run("decoder_cases.py")
    assert "llama equal" in said and "qwen3 equal" in said
    products, kernels = ["linear"] * 4, ["_rms_norm", "_rms_norm", "_silu_mul", "rotate_and_store", "attend", "reduce"]
    for line in said.splitlines():
        assert sorted(line.partition("launches ")[2].split()) == sorted(products + kernels)


def test_diffusion_transformers_with_fused_blocks_equal_diffusers_in_fewer_launches() -> None:
    pytest.importorskip("diffusers", reason="no diffusers: its blocks are not compared")
    assert run("dit_cases.py").count("equal") == 4


# Heads, Llama-3.1-8B, Llama-3.1-70B
@pytest.mark.parametrize("width", [128, 4096, 8192])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm_compiles_for_hopper(width: int, has_residual: bool) -> None:
    from models.kernels.rms_norm import _rms_norm

    rows = max(1024 // width, 1)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr"), "*bf16")
    numbers: dict[str, Any] = {"num_rows": "i32", "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"}
    constants = {"width": width, "rows": rows, "lanes": width, "has_residual": has_residual}
    usage = compile_for_sm90(_rms_norm, pointers | numbers | constants, num_warps=rows * width // 512)
    assert usage.spills == 0 and usage.registers <= 64, usage


def test_silu_mul_compiles_for_hopper() -> None:
    from models.kernels.silu_mul import _LANES, _silu_mul

    pointers: dict[str, Any] = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride": "i32"}
    usage = compile_for_sm90(_silu_mul, pointers | {"width": 14336, "lanes": _LANES})
    assert usage.spills == 0 and usage.registers <= 48, usage


# DiT-XL, FLUX.1
@pytest.mark.parametrize("width", [1152, 3072])
@pytest.mark.parametrize("adds", [False, True])
def test_modulate_compiles_for_hopper(width: int, adds: bool) -> None:
    from models.kernels.modulate import _modulate

    lanes = 2048 if width == 1152 else 4096
    arguments: dict[str, Any] = {
        name: "*bf16" if name.endswith("_ptr") else "i32" for name in _modulate.arg_names if name != "eps"
    }
    arguments = {name: arguments.get(name, "fp32") for name in _modulate.arg_names}
    arguments |= {"width": width, "lanes": lanes, "adds": adds, "norms": True}
    usage = compile_for_sm90(_modulate, arguments, num_warps=lanes // 512)
    assert usage.spills == 0 and usage.registers <= 64, usage


def test_norm_rotate_compiles_for_hopper() -> None:
    """At FLUX.1's heads."""
    from models.kernels.norm_rotate import _norm_rotate

    arguments: dict[str, Any] = dict.fromkeys(_norm_rotate.arg_names, "i32")
    arguments |= dict.fromkeys(("x_ptr", "out_ptr", "weight_ptr"), "*bf16") | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    arguments |= {"eps": "fp32", "num_heads": 24, "head_dim": 128, "heads": 8, "lanes": 128}
    usage = compile_for_sm90(_norm_rotate, arguments, num_warps=2)
    assert usage.spills == 0 and usage.registers <= 64, usage
