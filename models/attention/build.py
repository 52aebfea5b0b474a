"""Which attention backend computes a model: by name, or the fastest that is at hand for the device."""

from __future__ import annotations

from models.attention.base import AttentionBackend, KVCacheSpec

NAMES = ("auto", "sdpa", "cpu")


def make_attention(name: str, spec: KVCacheSpec, num_heads: int) -> AttentionBackend:
    """The backend called `name` ("auto": the fastest for `spec.device`). Raises ValueError for one that cannot be."""
    if name == "auto":
        name = "cpu" if spec.device.type == "cpu" else "sdpa"
    if name == "sdpa":
        from models.attention.sdpa import SdpaAttention

        return SdpaAttention(spec, num_heads)
    if name == "cpu":
        from models.attention.cpu import CpuAttention

        return CpuAttention(spec, num_heads)
    raise ValueError(f"attention backend {name!r} does not exist; choose one of {', '.join(NAMES)}")
