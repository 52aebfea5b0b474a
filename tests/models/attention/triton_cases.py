"""The Triton kernels beside the sdpa reference. A script: Triton reads TRITON_INTERPRET when it is imported.

TRITON_INTERPRET=1 python triton_cases.py        on CPU, by the interpreter
python triton_cases.py                           compiled, where there is a GPU
"""

from __future__ import annotations

import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.attention.sdpa import SdpaAttention
from models.attention.triton_paged import TritonAttention

NUM_BLOCKS = 40
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCHEDULE: list[dict[str, int]] = [
    {"a": 40, "b": 1},
    {"a": 1, "b": 1, "c": 70},
    {"c": 1, "d": 3, "a": 1, "b": 30},
    {"d": 1, "c": 1, "b": 1, "a": 1},
]
CASES: list[tuple[int, int, int, int, int | None, float | None]] = [
    # query heads, key heads, head dimension, block size, window, softcap
    (4, 2, 16, 16, None, None),
    (4, 4, 32, 8, None, None),
    (6, 1, 24, 16, None, None),  # a head dimension that is no power of two
    (4, 2, 16, 16, 7, None),
    (4, 2, 16, 16, 33, None),
    (4, 2, 16, 16, None, 1.5),
]


def compare(
    heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None, softcap: float | None
) -> None:
    """Mixed steps of four sequences on scattered blocks; float32 sums over at most 71 keys, in another order."""
    spec = KVCacheSpec(1, kv_heads, head_dim, block_size, torch.float32, DEVICE)
    ours, reference = TritonAttention(spec, heads), SdpaAttention(spec, heads)
    (our_cache,), (their_cache,) = ours.allocate(NUM_BLOCKS), reference.allocate(NUM_BLOCKS)
    generator = torch.Generator().manual_seed(0)
    free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    tables: dict[str, list[int]] = {}
    lengths: dict[str, int] = {}
    for new in SCHEDULE:
        layout = TokenLayout(
            num_new=list(new.values()),
            num_computed=[lengths.get(name, 0) for name in new],
            block_tables=[tables.setdefault(name, []) for name in new],
        )
        for name, num in new.items():
            lengths[name] = lengths.get(name, 0) + num
            while len(tables[name]) * block_size < lengths[name]:
                tables[name].append(free.pop())
        fused = torch.randn(sum(new.values()), heads + 2 * kv_heads, head_dim, generator=generator).to(DEVICE)
        q, new_kv = fused[:, :heads], fused[:, heads:].unflatten(1, (2, kv_heads))
        options = {"scale": 0.3, "window": window, "softcap": softcap}
        out = ours.attend(q, new_kv, our_cache, ours.plan(layout), **options)
        expected = reference.attend(q, new_kv, their_cache, reference.plan(layout), **options)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        compare(*case)
        print("equal", case, flush=True)
