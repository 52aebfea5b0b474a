"""Paged attention by torch's own `varlen_attn`, where it takes block tables: with FlashAttention-3 (Shah et al., 2024).

torch brings the function and not the kernels: those are in the package flash-attn-3 (`flash_attn_interface`), which
torch activates; they need a Hopper GPU. Not run yet: tests compute the function's documented meaning in its place.

A layer's cache is [2, blocks, block, K, H]. No capped scores, no quantised cache, no CUDA graphs (the longest lengths
of a step are plain numbers of the call).

Legend: T tokens, S sequences, N query heads, K key/value heads, H head dimension, W blocks of the longest sequence.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.staging import Staging

Varlen = Callable[..., torch.Tensor]


def why_not(spec: KVCacheSpec) -> str | None:
    """Why this backend cannot compute with such a cache here; None if it can."""
    if spec.is_quantized:
        return f"keeps no KV cache in {spec.kv_dtype}"
    if spec.caps_scores:
        return "cannot cap scores, as this model does"
    if spec.device.type != "cuda" or torch.cuda.get_device_capability(spec.device)[0] != 9:
        return "needs a Hopper GPU"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return "computes in bfloat16 and float16 only"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or "block_table" not in _parameters():
        return f"needs a torch whose varlen_attn takes block tables (2.13 does), which {torch.__version__} does not"
    return "needs the package flash-attn-3" if importlib.util.find_spec("flash_attn_interface") is None else None


@dataclass(slots=True)
class _Plan:
    tokens_T2: torch.Tensor
    """int64: sequence and position, as the host knows it."""
    tables_SW: torch.Tensor
    starts_S: torch.Tensor
    """int32 [S + 1]: where the tokens of each sequence begin."""
    lengths_S: torch.Tensor
    behind_S: torch.Tensor | None
    longest: tuple[int, int]
    """New tokens and positions of a sequence, at most."""
    slots_T: torch.Tensor | None = None
    """Where the new tokens go; found by the first layer, when what was staged has arrived."""


class VarlenAttention:
    """Paged attention by `varlen_attn`."""

    def __init__(self, spec: KVCacheSpec, num_heads: int, varlen: Varlen | None = None):
        """`varlen`: in the place of torch's, for tests."""
        self._spec = spec
        self._varlen = varlen or _activate()
        self._is_grouped = num_heads != spec.num_kv_heads

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape = (2, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return [torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            layer[:, targets] = layer[:, sources]

    def plan(self, layout: TokenLayout, staging: Staging) -> _Plan:
        num_new_S, start_S = np.array(layout.num_new), np.array(layout.num_computed)
        sequence_T = np.repeat(np.arange(len(num_new_S)), num_new_S)
        first_S = np.cumsum(num_new_S) - num_new_S
        position_T = np.arange(len(sequence_T)) + (start_S - first_S)[sequence_T]
        length_S = num_new_S + start_S
        width = -(-int(length_S.max()) // self._spec.block_size)
        tables_SW = np.zeros((len(num_new_S), width), np.int32)
        for row, table in zip(tables_SW, layout.block_tables, strict=True):
            row[: len(table)] = table[:width]
        return _Plan(
            staging.put(np.stack((sequence_T, position_T), 1), torch.int64),
            staging.put(tables_SW, torch.int32),
            staging.put(np.concatenate(([0], np.cumsum(num_new_S))), torch.int32),
            staging.put(length_S, torch.int32),
            None if layout.behind is None else staging.place(layout.behind),
            (int(num_new_S.max()), int(length_S.max())),
        )

    def attend(
        self,
        q_TNH: torch.Tensor,
        new_T2KH: torch.Tensor,
        kv: torch.Tensor,
        plan: _Plan,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        assert softcap is None, "why_not has refused it"
        if plan.slots_T is None:
            self._locate(plan)
        keys, values = kv
        for part, new_TKH in ((keys, new_T2KH[:, 0]), (values, new_T2KH[:, 1])):
            part.view(-1, *part.shape[2:]).index_copy_(0, plan.slots_T, new_TKH)
        return self._varlen(
            q_TNH,
            keys,
            values,
            plan.starts_S,
            None,
            *plan.longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=self._is_grouped,
            seqused_k=plan.lengths_S,
            block_table=plan.tables_SW,
        )

    def _locate(self, plan: _Plan) -> None:
        """Take off what the sequences are behind, and find the slots of their new tokens."""
        size = self._spec.block_size
        sequence_T, position_T = plan.tokens_T2.unbind(1)
        if plan.behind_S is not None:
            position_T = position_T - plan.behind_S[sequence_T]
            plan.lengths_S = plan.lengths_S - plan.behind_S
        plan.slots_T = plan.tables_SW[sequence_T, position_T // size].long() * size + position_T % size


def _parameters() -> list[str]:
    from torch.nn.attention.varlen import varlen_attn

    return list(inspect.signature(varlen_attn).parameters)


def _activate() -> Varlen:
    """From here on torch's flash attention is FlashAttention-3, in the whole process."""
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    if current_flash_attention_impl() != "FA3":
        activate_flash_attention_impl("FA3")
    return varlen_attn  # type: ignore[return-value]  # a tensor unless more is asked for
