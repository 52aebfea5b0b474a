"""Which attention backend computes a model: by name, or the fastest that is at hand for the device."""

from __future__ import annotations

from models.attention.base import AttentionBackend, KVCacheSpec
from models.attention.sdpa import SdpaAttention


def make_attention(name: str, spec: KVCacheSpec, num_heads: int) -> AttentionBackend:
    """The backend called `name` ("auto": the fastest for `spec.device`). Raises ValueError for an unknown one."""
    if name in ("auto", "sdpa"):
        return SdpaAttention(spec, num_heads)
    raise ValueError(f"attention backend {name!r} does not exist; choose auto or sdpa")
