"""The Triton kernels beside the sdpa reference in float64. A script: Triton reads TRITON_INTERPRET when it is imported.

TRITON_INTERPRET=1 python triton_cases.py 12     on CPU, by the interpreter
python triton_cases.py 12                        compiled, where there is a GPU; then in bfloat16, too

The argument is a number of random cases. The interpreter takes bfloat16 for integers in products, so float16 stands
for it there.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from ragged import Step, expected, found, random_step

from models.attention.base import KVCacheSpec
from models.attention.quantized_kv import quantize
from models.attention.triton_paged import TritonAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
BOUNDS = {
    # Sums over at most 600 keys of products of numbers of size one, in another order than the oracle's.
    torch.float32: 4e-6,
    # Weights are rounded to the tile's dtype for the second product, and the result once more (2^-11, 2^-8 a number).
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


@dataclass(frozen=True)
class Case:
    num_new: list[int]
    num_computed: list[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    behind: list[int] | None = None
    kv_dtype: str = "auto"
    dtype: torch.dtype = torch.float32
    num_processors: int = 2
    seed: int = field(default=0, compare=False)


def edges(block: int) -> list[int]:
    """Lengths around the ends of blocks, and of iterations."""
    return [1, block - 1, block, block + 1, 2 * block, 4 * block - 1, 4 * block, 4 * block + 1]


def stated() -> list[Case]:
    """What must not be left to chance."""
    lengths = edges(16)
    cases = [
        Case([1] * 8, [length - 1 for length in lengths]),  # decodes at every edge
        Case([1] * 8, [length - 1 for length in lengths], window=17, block_size=8, num_processors=1),
        Case([4] * 4, [0, 13, 60, 300], num_processors=8),  # drafts to verify, split
        Case([70, 1, 33], [0, 129, 200]),  # chunks beside a decode
        Case([1], [600], num_processors=40),  # a lone decode in as many parts as there may be
        Case([1, 1], [128, 40], num_processors=1),  # as few as there can be
        Case([1, 2, 20], [300, 90, 130], behind=[3, 0, 2], num_processors=4),
        Case([2, 2], [16, 17], behind=[1, 1]),  # back over the end of a block
        Case([1, 5], [150, 20], softcap=1.5, num_processors=4),
        Case([1, 30], [290, 200], window=64, softcap=1.5, num_processors=4),
        Case([1, 25], [290, 64], heads=8, kv_heads=1, num_processors=4),
        Case([1, 25], [290, 64], heads=3, kv_heads=3, num_processors=4),
    ]
    cases += [Case([1, 3, 40], [200, 30, 50], heads=8, kv_heads=2, head_dim=dim, dtype=HALF) for dim in (64, 80, 128)]
    cases += [Case([1, 3, 20], [200, 30, 31], kv_dtype=kind, num_processors=4) for kind in ("fp8_e4m3", "int8")]
    return cases


def drawn(seed: int) -> Case:
    rng = random.Random(seed)
    size = rng.choice([8, 16, 32])
    count = rng.randint(1, 4)
    num_new = [rng.choice([1, 1, 1, 2, 4, rng.randint(5, 40)]) for _ in range(count)]
    starts = [rng.choice([rng.choice(edges(size)) - 1, rng.randint(0, 300)]) for _ in range(count)]
    kv_heads, group = rng.choice([(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)])
    behind = [min(start, rng.randint(0, 4)) for start in starts] if rng.random() < 0.3 else None
    return Case(
        num_new,
        starts,
        kv_heads * group,
        kv_heads,
        rng.choice([16, 24, 64, 80]),
        size,
        rng.choice([None, None, 5, 64, 100]),
        rng.choice([None, None, 2.0]),
        behind,
        rng.choice(["auto", "auto", "fp8_e4m3", "int8"]),
        rng.choice([torch.float32, HALF]),
        rng.choice([1, 2, 8, 40]),
        seed,
    )


def spec_of(case: Case) -> KVCacheSpec:
    return KVCacheSpec(1, case.kv_heads, case.head_dim, case.block_size, case.dtype, DEVICE, case.kv_dtype)


def write_past(kv: torch.Tensor, spec: KVCacheSpec, step: Step) -> None:
    """Poison, and in it what was computed before: by the layout that `triton_paged.py` states, not by its kernels."""
    num_slots = 2 * spec.num_kv_heads * spec.block_size
    if spec.is_quantized:
        kv.fill_(0xFF)  # NaN as e4m3, and as float32
        numbers, scales = kv[:, : num_slots * spec.head_dim], kv[:, num_slots * spec.head_dim :].view(torch.float32)
        scales = scales.view(-1, 2, spec.num_kv_heads, spec.block_size)
        cache = numbers.view(-1, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
    else:
        cache = kv.fill_(torch.nan)
    for past, table in zip(step.past, step.layout.block_tables, strict=True):
        for first in range(0, len(past), spec.block_size):
            rows = past[first : first + spec.block_size].permute(1, 2, 0, 3).to(DEVICE)
            block = table[first // spec.block_size]
            if spec.is_quantized:
                values, row_scales = quantize(rows, spec.kv_dtype)
                cache[block, :, :, : rows.shape[2]] = values.view(torch.uint8)
                scales[block, :, :, : rows.shape[2]] = row_scales
            else:
                cache[block, :, :, : rows.shape[2]] = rows


def error_of(case: Case) -> float:
    spec = spec_of(case)
    backend = TritonAttention(spec, case.heads, num_processors=case.num_processors)
    step = random_step(spec, case.heads, case.num_new, case.num_computed, behind=case.behind, seed=case.seed)
    (kv,) = backend.allocate(step.num_blocks)
    write_past(kv, spec, step)
    out = found(backend, kv, spec, step, window=case.window, softcap=case.softcap)
    wanted = expected(spec, case.heads, step, window=case.window, softcap=case.softcap)
    return float((out.double() - wanted).abs().nan_to_num(torch.inf).max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    # An output must be written wholly: what is not stays poison.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: (lambda x: x.fill_(torch.nan) if x.is_floating_point() else x)(  # type: ignore
        empty(*args, **kwargs)
    )
    worst: dict[torch.dtype, float] = {}
    cases = stated() + [drawn(seed) for seed in range(int(sys.argv[1]))]
    for case in cases:
        error = error_of(case)
        assert error < BOUNDS[case.dtype], f"error {error} of {case}"
        worst[case.dtype] = max(worst.get(case.dtype, 0.0), error)
    print(len(cases), "equal;", *(f"{dtype}: {error:.1e}" for dtype, error in worst.items()))
