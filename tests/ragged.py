"""Random steps over ragged sequences for any backend, and what float64 makes of them.

Everything a backend must not look at is poison: slots that no position has been written to, and what a sequence has
behind its true end. The oracle is the sdpa backend in float64 over the very numbers the backend was given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.attention.sdpa import SdpaAttention
from models.staging import Staging

CPU = torch.device("cpu")
SCALE = 0.3


@dataclass(frozen=True, slots=True)
class Step:
    """Numbers of one step, and of what was computed before it."""

    layout: TokenLayout
    qkv_TMH: torch.Tensor
    """New queries, keys and values side by side, as a projection gives them."""
    past: list[torch.Tensor]
    """[positions, 2, K, H] of each sequence."""
    num_blocks: int

    def operands(self, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_heads = self.qkv_TMH.shape[1] - 2 * num_kv_heads
        return self.qkv_TMH[:, :num_heads], self.qkv_TMH[:, num_heads:].unflatten(1, (2, num_kv_heads))


def random_step(
    spec: KVCacheSpec,
    num_heads: int,
    num_new: list[int],
    num_computed: list[int],
    *,
    behind: list[int] | None = None,
    seed: int = 0,
) -> Step:
    """Sequences on scattered blocks. `num_computed` is what the host believes, too much by `behind`."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, spec.head_dim, generator=generator).to(spec.dtype)

    needed = [-(-(new + start) // spec.block_size) for new, start in zip(num_new, num_computed, strict=True)]
    num_blocks = sum(needed) + 2
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[order.pop() for _ in range(num)] for num in needed]
    missing = behind or [0] * len(num_new)
    layout = TokenLayout(num_new, num_computed, tables, None if behind is None else torch.tensor(behind).int())
    past = [numbers(start - off, 2, spec.num_kv_heads) for start, off in zip(num_computed, missing, strict=True)]
    return Step(layout, numbers(sum(num_new), num_heads + 2 * spec.num_kv_heads), past, num_blocks)


def expected(
    spec: KVCacheSpec, num_heads: int, step: Step, *, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """What the step's attention is, in float64."""
    exact = replace(spec, dtype=torch.float64, device=CPU)
    oracle, staging = SdpaAttention(exact, num_heads), Staging(CPU)
    (kv,) = oracle.allocate(step.num_blocks)
    if not spec.is_quantized:
        kv.fill_(torch.nan)
    lengths = [len(past) for past in step.past]
    written = [index for index, length in enumerate(lengths) if length]
    if written:
        before = TokenLayout(
            [lengths[index] for index in written],
            [0] * len(written),
            [step.layout.block_tables[index] for index in written],
        )
        rows = torch.cat(step.past).double()
        oracle.attend(rows[:, 0].repeat_interleave(num_heads // spec.num_kv_heads, 1), rows, kv,
                      oracle.plan(before, staging), scale=SCALE)  # fmt: skip
    q_TNH, new_T2KH = step.operands(spec.num_kv_heads)
    plan = oracle.plan(step.layout, staging)
    return oracle.attend(q_TNH.double(), new_T2KH.double(), kv, plan, scale=SCALE, window=window, softcap=softcap)


def found(
    backend: AttentionBackend,
    kv: torch.Tensor,
    spec: KVCacheSpec,
    step: Step,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """What `backend` makes of it; `kv` holds the past already."""
    staging = Staging(spec.device)
    plan = backend.plan(step.layout, staging)
    staging.send()
    q_TNH, new_T2KH = (part.to(spec.device) for part in step.operands(spec.num_kv_heads))
    return backend.attend(q_TNH, new_T2KH, kv, plan, scale=SCALE, window=window, softcap=softcap).cpu()
