"""The attention kernels compile for Hopper, and fit it: registers without spills, shared memory, programs at a time."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from sm90 import Usage, compile_for_sm90

from models.attention.base import KVCacheSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the CUDA kernels stay unchecked"
)
LLAMA = KVCacheSpec(32, 8, 128, 16, torch.bfloat16, torch.device("cpu"))
"""Llama-3.1-8B: 32 query heads."""
REGISTERS, SHARED = 65536, 227 << 10
"""Of a multiprocessor."""
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", "fp8_e4m3": "*fp8e4nv", "int8": "*i8"}


def shape_of(spec: KVCacheSpec) -> dict[str, Any]:
    import triton

    heads = {"num_groups": 4, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    return heads | {"padded_head": triton.next_power_of_2(spec.head_dim), "block_size": spec.block_size}


def attend(spec: KVCacheSpec, rows: int, *, window: int = 0, softcap: bool = False) -> Usage:
    from models.attention import triton_attend
    from models.attention.triton_paged import launch_options

    number = POINTERS[spec.dtype]
    kv = number if spec.kv_dtype == "auto" else POINTERS[spec.kv_dtype]
    given: dict[str, Any] = {
        "q_ptr": number,
        "out_ptr": number,
        "kv_ptr": kv,
        "scales_ptr": "*fp32",
        "lse_ptr": "*fp32",
    }
    given |= {"parts_ptr": "*fp32", "scale": "fp32", "softcap": "fp32", "q_stride": "i32"} | shape_of(spec)
    options = launch_options(spec, rows)
    given |= {"window": window, "has_softcap": softcap, "rows": rows, "keys": options.pop("keys")}
    return compile_for_sm90(
        triton_attend.attend, {name: given.get(name, "*i32") for name in triton_attend.attend.arg_names}, **options
    )


# Decodes, drafts to verify beside them, chunks: how many programs a multiprocessor is to run at a time.
@pytest.mark.parametrize(("rows", "warps", "programs"), [(16, 4, 3), (64, 4, 2), (128, 8, 1)])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3", "int8"])
def test_attention_of_llama_8b_fits_a_multiprocessor(rows: int, warps: int, programs: int, kv_dtype: str) -> None:
    usage = attend(replace(LLAMA, kv_dtype=kv_dtype), rows)
    programs = programs if kv_dtype == "auto" else min(programs, 2)
    assert usage.spills == 0, usage
    assert programs * usage.registers * 32 * warps <= REGISTERS and programs * (usage.shared + 1024) <= SHARED, usage


@pytest.mark.parametrize("rows", [16, 128])
def test_windows_and_capped_scores_spill_nothing(rows: int) -> None:
    assert attend(LLAMA, rows, window=4096, softcap=True).spills == 0


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        (replace(LLAMA, head_dim=80), 16),
        (replace(LLAMA, head_dim=256), 64),  # chunks of wide heads
        (replace(LLAMA, dtype=torch.float32), 16),  # exact, in small tiles
    ],
)
def test_other_shapes_spill_nothing(spec: KVCacheSpec, rows: int) -> None:
    usage = attend(spec, rows)
    assert usage.spills == 0 and usage.shared <= SHARED, usage


def test_the_reduction_spills_nothing() -> None:
    from models.attention import triton_attend
    from models.attention.tiles import MAX_PARTS

    shape = {name: value for name, value in shape_of(LLAMA).items() if name != "block_size"}
    given: dict[str, Any] = {"out_ptr": "*bf16", "parts_ptr": "*fp32", "lse_ptr": "*fp32", "tiles_ptr": "*i32"} | shape
    usage = compile_for_sm90(
        triton_attend.reduce, given | {"rows": 16, "max_parts": MAX_PARTS, "parts_at_once": 16}, num_warps=2
    )
    assert usage.spills == 0 and usage.registers <= 128, usage


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_and_writing_spill_nothing(kv_dtype: str, has_norm: bool) -> None:
    from models.attention import triton_store

    kernel = triton_store.rotate_and_store
    given: dict[str, Any] = {"qkv_ptr": "*bf16", "cis_ptr": "*fp32", "norm_ptr": "*bf16" if has_norm else "*fp32"}
    given |= {"eps": "fp32", "kv_ptr": POINTERS.get(kv_dtype, "*bf16"), "scales_ptr": "*fp32", "token_stride": "i32"}
    given |= {"padded_groups": 4, "has_norm": has_norm} | shape_of(LLAMA)
    usage = compile_for_sm90(kernel, {name: given.get(name, "*i32") for name in kernel.arg_names}, num_warps=1)
    assert usage.spills == 0 and usage.registers <= 168, usage
