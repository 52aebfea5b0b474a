"""Paged attention by FlashInfer (Ye et al., 2025), an extra: its prefill kernels, which compute any step.

Written from its documented interface and not run yet: tests compute the documented meaning in its place. FlashInfer
plans on the host, by exact lengths, and once for each window and cap of scores; so a step whose lengths only the device
knows (`TokenLayout.behind`) is waited for here, and there are no CUDA graphs.

A layer's cache is [blocks, 2, K, block, H], FlashInfer's "HND", the same as `triton_paged.py`'s.

Legend: T tokens, S sequences, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.staging import Staging

_WORKSPACE_BYTES = 128 << 20
"""What its documentation recommends; for the parts of split sequences."""
_HEAD_DIMS = (64, 128, 256)
"""Those it is built for."""


def why_not(spec: KVCacheSpec) -> str | None:
    """Why this backend cannot compute with such a cache here; None if it can."""
    if spec.is_quantized:
        return f"keeps no KV cache in {spec.kv_dtype} with a scale for each row"
    if spec.device.type != "cuda":
        return f"cannot compute on {spec.device}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return "computes in bfloat16 and float16 only"
    if spec.head_dim not in _HEAD_DIMS:
        return f"has no kernels for heads of {spec.head_dim}"
    if importlib.util.find_spec("flashinfer") is None:
        return 'needs the package flashinfer-python (pip install "tandem-serve[flashinfer]")'
    return None


@dataclass(frozen=True, slots=True)
class _Plan:
    sequence_T: torch.Tensor
    position_T: torch.Tensor
    starts_S: torch.Tensor
    """On the host, int32 [S + 1]: where the tokens of each sequence begin."""
    first_block_S: torch.Tensor
    """The same for its blocks."""
    blocks: torch.Tensor
    last_length_S: torch.Tensor
    """On the host: positions in its last block."""
    first_block_on_device_S: torch.Tensor
    last_length_on_device_S: torch.Tensor
    ready: dict[tuple[float, int | None, float | None], Any] = field(default_factory=dict)
    """Planned kernels, by scale, window and cap."""


class FlashInferAttention:
    """Paged attention by FlashInfer's batch prefill."""

    def __init__(self, spec: KVCacheSpec, num_heads: int):
        self._spec = spec
        self._num_heads = num_heads
        self._flashinfer = importlib.import_module("flashinfer")
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=spec.device)
        self._wrappers: dict[tuple[float, int | None, float | None], Any] = {}

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return [torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.num_layers)]

    def copy_blocks(self, kv: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
        for layer in kv:
            layer[targets] = layer[sources]

    def plan(self, layout: TokenLayout, staging: Staging) -> _Plan:
        size = self._spec.block_size
        num_new_S, start_S = np.array(layout.num_new), np.array(layout.num_computed)
        if layout.behind is not None:
            start_S = start_S - layout.behind.cpu().numpy()
        length_S = num_new_S + start_S
        num_blocks_S = -(-length_S // size)
        sequence_T = np.repeat(np.arange(len(num_new_S)), num_new_S)
        first_S = np.cumsum(num_new_S) - num_new_S
        tables = [table[:num] for table, num in zip(layout.block_tables, num_blocks_S, strict=True)]
        first_block_S = np.concatenate(([0], np.cumsum(num_blocks_S))).astype(np.int32)
        last_length_S = ((length_S - 1) % size + 1).astype(np.int32)
        return _Plan(
            staging.put(sequence_T, torch.int32),
            staging.put(np.arange(len(sequence_T)) + (start_S - first_S)[sequence_T], torch.int32),
            torch.from_numpy(np.concatenate(([0], np.cumsum(num_new_S))).astype(np.int32)),
            torch.from_numpy(first_block_S),
            staging.put(np.concatenate(tables), torch.int32),
            torch.from_numpy(last_length_S),
            staging.put(first_block_S, torch.int32),
            staging.put(last_length_S, torch.int32),
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
        self._flashinfer.append_paged_kv_cache(
            new_T2KH[:, 0],
            new_T2KH[:, 1],
            plan.sequence_T,
            plan.position_T,
            kv,
            plan.blocks,
            plan.first_block_on_device_S,
            plan.last_length_on_device_S,
            kv_layout="HND",
        )
        kind = (scale, window, softcap)
        if kind not in plan.ready:
            plan.ready[kind] = self._planned(plan, *kind)
        out_TNH: torch.Tensor = plan.ready[kind].run(q_TNH.contiguous(), kv)
        return out_TNH

    def _planned(self, plan: _Plan, scale: float, window: int | None, softcap: float | None) -> Any:
        """A wrapper that knows this step. Each kind has its own, since a plan lives in its wrapper."""
        kind, spec = (scale, window, softcap), self._spec
        if kind not in self._wrappers:
            make = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper
            self._wrappers[kind] = make(self._workspace, kv_layout="HND")
        wrapper = self._wrappers[kind]
        wrapper.plan(
            qo_indptr=plan.starts_S,
            paged_kv_indptr=plan.first_block_S,
            paged_kv_indices=plan.blocks,
            paged_kv_last_page_len=plan.last_length_S,
            num_qo_heads=self._num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim_qk=spec.head_dim,
            page_size=spec.block_size,
            causal=True,
            sm_scale=scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=softcap,
            q_data_type=spec.dtype,
            kv_data_type=spec.dtype,
        )
        return wrapper
