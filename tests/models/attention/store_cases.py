"""The kernels that write the cache, beside plain torch. A script: Triton reads TRITON_INTERPRET when it is imported.

TRITON_INTERPRET=1 python store_cases.py        on CPU, by the interpreter
python store_cases.py                           compiled, where there is a GPU
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from paged import PagedModel
from ragged import Step, random_step
from tiny import tiny_model

from models.attention.base import KVCacheSpec
from models.attention.quantized_kv import quantize
from models.attention.triton_paged import TritonAttention
from models.registry import load_text_model
from models.staging import Staging
from models.text.rope import rotate_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, BLOCK, EPS = 6, 2, 4, 1e-5
STEP = ([1, 3, 2], [3, 7, 0])
"""New tokens, and computed ones: over the ends of blocks."""


def cis_of(step: Step, head_dim: int) -> torch.Tensor:
    angles = torch.randn(len(step.qkv_TMH), 1, head_dim // 2, generator=torch.Generator().manual_seed(1))
    return torch.polar(torch.full_like(angles, 1.25), angles).to(DEVICE)


def rotated(qkv_TMH: torch.Tensor, cis_T1C: torch.Tensor, weight_RH: torch.Tensor | None) -> torch.Tensor:
    """What the kernel is to compute, in float64 and not rounded: queries and keys normed and rotated."""
    qk_TRH = qkv_TMH[:, : HEADS + KV_HEADS].double()
    if weight_RH is not None:
        qk_TRH = qk_TRH / (qk_TRH.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_RH.double()
    qk_TRH = qk_TRH.clone()
    rotate_(qk_TRH, cis_T1C.to(torch.complex128))
    return qk_TRH


def slots(kv: torch.Tensor, spec: KVCacheSpec, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2, K, H] what lies in the slots of the step's tokens, as numbers, and how many slots are not poison."""
    if spec.is_quantized:
        num = 2 * spec.num_kv_heads * spec.block_size
        kind = torch.int8 if spec.kv_dtype == "int8" else torch.float8_e4m3fn
        values = kv[:, : num * spec.head_dim].view(kind).float().view(-1, 2, KV_HEADS, BLOCK, spec.head_dim)
        scales = kv[:, num * spec.head_dim :].view(torch.float32).view(-1, 2, KV_HEADS, BLOCK, 1)
        cache = values * scales
    else:
        cache = kv
    behind = [0] * len(STEP[0]) if step.layout.behind is None else step.layout.behind.tolist()
    places = [
        (table[(start - off + i) // BLOCK], (start - off + i) % BLOCK)
        for num, start, table, off in zip(*STEP, step.layout.block_tables, behind, strict=True)
        for i in range(num)
    ]
    found = torch.stack([cache[block, :, :, place] for block, place in places])
    return found, cache.isfinite().all(-1).sum()


def check(dtype: torch.dtype, head_dim: int, kv_dtype: str, has_norm: bool, behind: list[int] | None) -> float:
    """Largest error of the queries and of the cache's numbers, as a share of what they are allowed."""
    spec = KVCacheSpec(1, KV_HEADS, head_dim, BLOCK, dtype, DEVICE, kv_dtype)
    backend, staging = TritonAttention(spec, HEADS), Staging(DEVICE)
    step = random_step(spec, HEADS, *STEP, behind=behind)
    (kv,) = backend.allocate(step.num_blocks)
    kv.fill_(0xFF if spec.is_quantized else torch.nan)
    qkv_TMH, cis_T1C = step.qkv_TMH.clone().to(DEVICE), cis_of(step, head_dim)
    weight_RH = torch.rand(HEADS + KV_HEADS, head_dim).to(DEVICE, dtype) if has_norm else None
    plan = backend.plan(step.layout, staging)
    staging.send()
    exact_TRH = rotated(qkv_TMH, cis_T1C, weight_RH)
    values_TKH = qkv_TMH[:, HEADS + KV_HEADS :].clone()
    backend.rotate_and_store(qkv_TMH, cis_T1C, None if weight_RH is None else (weight_RH, EPS), kv, plan)
    assert torch.equal(qkv_TMH[:, HEADS + KV_HEADS :], values_TKH), "values are not to be changed"
    # Rounded once from float32; the interpreter truncates to bfloat16.
    step_size = 2.0**-7 if dtype == torch.bfloat16 else torch.finfo(dtype).eps
    allowed = 1e-6 + step_size * exact_TRH.abs()
    worst = float(((qkv_TMH[:, :HEADS].double() - exact_TRH[:, :HEADS]).abs() / allowed[:, :HEADS]).max())
    found_T2KH, num_written = slots(kv, spec, step)
    assert int(num_written) == 2 * KV_HEADS * sum(STEP[0]), "other slots are not to be touched"
    wanted = torch.stack((exact_TRH[:, HEADS:], values_TKH.double()), 1)
    if spec.is_quantized:
        # Within half a step of the format about what was to be quantised, which was rounded to the dtype before.
        largest = wanted.abs().amax(-1, keepdim=True)
        half = largest / 254 if kv_dtype == "int8" else torch.maximum(wanted.abs() / 16, largest / 448 / 1024)
        allowed = half * 1.001 + step_size * wanted.abs() * (1 if kv_dtype == "int8" else 1.1) + 1e-6
        allowed += step_size * largest / 127
        values, scales = quantize(values_TKH, kv_dtype)
        assert torch.equal(found_T2KH[:, 1], values.float() * scales[..., None]), "bit for bit what torch makes of it"
    else:
        allowed = 1e-6 + step_size * wanted.abs()
        assert torch.equal(found_T2KH[:, 1], values_TKH)
    return max(worst, float(((found_T2KH.double() - wanted).abs() / allowed).max()))


def check_decoder(family: str) -> None:
    """transformers' logits from the native decoder, whose queries, keys and values go through the fused kernel."""
    theirs = tiny_model(family)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = load_text_model(Path(folder), device=torch.device("cpu"))
    ours = PagedModel(model, "triton")
    ids = torch.randint(0, 256, (11,), generator=torch.Generator().manual_seed(0)).tolist()
    found = torch.cat(
        [ours.step({"a": ids[:9]})["a"], ours.step({"a": ids[9:10]})["a"], ours.step({"a": ids[10:]})["a"]]
    )
    torch.testing.assert_close(found, theirs(torch.tensor([ids])).logits[0], atol=2e-5, rtol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    cases = [(dtype, 16, "auto", False, None) for dtype in dtypes]
    cases += [(torch.float32, 64, "auto", True, None), (torch.float16, 80, "auto", True, [2, 1, 0])]
    cases += [(torch.float16, 16, kind, has_norm, [1, 0, 0]) for kind, has_norm in
              itertools.product(("fp8_e4m3", "int8"), (False, True))]  # fmt: skip
    for case in cases:
        share = check(*case)
        assert share <= 1, f"{share} of what is allowed: {case}"
    if DEVICE.type == "cpu":
        check_decoder("llama")
        check_decoder("qwen3")
    print(len(cases), "equal")
