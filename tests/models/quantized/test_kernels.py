"""The quantised products' Triton kernels: right by the interpreter, compiled for Hopper at Llama-3.1-8B's shapes."""

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


def test_products_equal_those_of_the_dequantised_matrix_by_the_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is first imported, and others may have done that."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    command = [sys.executable, Path(__file__).with_name("kernel_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "15 products within bounds" in done.stdout and "every product within bounds" in done.stdout


@pytest.mark.parametrize(
    ("form", "rows"), [("int8", 16), ("int8", 128), ("int4", 16), ("int4", 64), ("fp8", 16), ("fp8", 128)]
)
def test_the_product_compiles_for_hopper(form: str, rows: int) -> None:
    """Rows of 4096 features: queries, keys and values, gate and up. Two programs of few rows fit a multiprocessor."""
    from models.quantized.triton_product import _multiply

    values = {"int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}[form]
    arguments: dict[str, Any] = {
        "x_ptr": values if form == "fp8" else "*bf16",
        "values_ptr": values,
        "scale_ptr": "*bf16" if form == "int4" else "*fp32",
        "zero_ptr": "*bf16" if form == "int4" else None,
        "row_scale_ptr": "*fp32" if form == "fp8" else None,
        "bias_ptr": None,
        "y_ptr": "*bf16",
        **dict.fromkeys(("num_rows", "out_features", "x_stride"), "i32"),
        "width": 4096,
        "group": 4096 if form == "int8" else 128,
        "chunk": 64 if form == "int4" else 128,
        "packs": 2 if form == "int4" else 1,
        "has_zero": form == "int4",
        "scales_rows": form == "fp8",
        "has_bias": False,
        "rows": rows,
        "features": 128 if rows == 128 else 64,
        "parts": 1,
    }
    usage = compile_for_sm90(_multiply, arguments, num_warps=4 if rows < 128 else 8, num_stages=4 if rows < 128 else 3)
    assert usage.spills == 0, usage
    assert usage.shared <= (114 if rows < 128 else 228) << 10, usage


@pytest.mark.parametrize(("group", "lanes"), [(128, 128), (4096, 4096), (14336, 16384)])
def test_quantising_rows_compiles_for_hopper(group: int, lanes: int) -> None:
    from models.quantized.triton_product import _quantize_rows

    arguments = {"x_ptr": "*bf16", "y_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "x_stride": "i32"}
    constants = {"width": max(group, 4096), "group": group, "lanes": lanes, "most": 448.0}
    usage = compile_for_sm90(_quantize_rows, arguments | constants, num_warps=max(1, min(8, lanes // 512)))
    assert usage.spills == 0, usage


def test_dequantising_compiles_for_hopper() -> None:
    from models.quantized.triton_product import _dequantize

    arguments = {"values_ptr": "*u8", "scale_ptr": "*bf16", "zero_ptr": "*bf16", "weight_ptr": "*bf16"}
    constants = {"width": 14336, "group": 128, "chunk": 64, "packs": 2, "has_zero": True, "lanes": 1024}
    usage = compile_for_sm90(_dequantize, arguments | constants)
    assert usage.spills == 0, usage
