"""Which attention backend computes a model: by name, or the fastest that is at hand for the device."""

from __future__ import annotations

import importlib.util

from models.attention.base import AttentionBackend, KVCacheSpec

NAMES = ("auto", "cpu", "sdpa", "triton")


def make_attention(name: str, spec: KVCacheSpec, num_heads: int) -> AttentionBackend:
    """The backend called `name` ("auto": the fastest for `spec.device`). Raises ValueError for one that cannot be."""
    if name == "auto":
        name = _fastest(spec.device.type)
    if name == "sdpa":
        from models.attention.sdpa import SdpaAttention

        return SdpaAttention(spec, num_heads)
    if name == "cpu":
        if spec.device.type != "cpu":
            raise ValueError(f"attention backend 'cpu' cannot compute on {spec.device}; choose auto, triton or sdpa")
        from models.attention.cpu import CpuAttention

        return CpuAttention(spec, num_heads)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("attention backend 'triton' needs the package triton; install it or choose sdpa")
        from models.attention.triton_paged import TritonAttention

        return TritonAttention(spec, num_heads)
    raise ValueError(f"attention backend {name!r} does not exist; choose one of {', '.join(NAMES)}")


def _fastest(device: str) -> str:
    if device == "cpu":
        return "cpu"
    return "triton" if device == "cuda" and importlib.util.find_spec("triton") is not None else "sdpa"
