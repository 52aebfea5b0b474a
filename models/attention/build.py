"""Which attention backend computes a model: by name, as measured, or as documented here where nothing is measured.

Not measured, CUDA computes with `triton` and CPU with `cpu`; `sdpa` does where they cannot.
"""

from __future__ import annotations

import importlib.util
import os

from models.attention import measured
from models.attention.base import AttentionBackend, KVCacheSpec

NAMES = ("auto", "cpu", "flashinfer", "sdpa", "triton", "varlen")
_FALLBACK = ("triton", "cpu", "sdpa")


def make_attention(name: str, spec: KVCacheSpec, num_heads: int) -> AttentionBackend:
    """The backend called `name`, or with "auto" the fastest for the device and shape of `spec`.

    Raises ValueError for one that does not exist or cannot compute this.
    """
    if name not in NAMES:
        raise ValueError(f"attention backend {name!r} does not exist; choose one of {', '.join(NAMES)}")
    if name == "auto":
        name = _choose(spec, num_heads)
    elif reason := why_not(name, spec):
        able = [other for other in NAMES[1:] if why_not(other, spec) is None]
        raise ValueError(f"attention backend {name!r} {reason}; choose auto or one of {', '.join(able)}")
    if name == "cpu":
        from models.attention.cpu import CpuAttention

        return CpuAttention(spec, num_heads)
    if name == "triton":
        from models.attention.triton_paged import TritonAttention

        return TritonAttention(spec, num_heads)
    if name == "varlen":
        from models.attention.varlen import VarlenAttention

        return VarlenAttention(spec, num_heads)
    if name == "flashinfer":
        from models.attention.flashinfer_paged import FlashInferAttention

        return FlashInferAttention(spec, num_heads)
    from models.attention.sdpa import SdpaAttention

    return SdpaAttention(spec, num_heads)


def why_not(name: str, spec: KVCacheSpec) -> str | None:
    """Why the backend cannot compute with such a cache here; None if it can."""
    device = spec.device.type
    if name == "cpu":
        if device != "cpu":
            return f"cannot compute on {spec.device}"
        return f"keeps no KV cache in {spec.kv_dtype}" if spec.is_quantized else None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "needs the package triton"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"cannot compute on {spec.device}"
    if name == "varlen":
        from models.attention import varlen

        return varlen.why_not(spec)
    if name == "flashinfer":
        from models.attention import flashinfer_paged

        return flashinfer_paged.why_not(spec)
    return None


def _choose(spec: KVCacheSpec, num_heads: int) -> str:
    names = [name for name in NAMES[1:] if why_not(name, spec) is None]
    if spec.device.type == "cpu":
        names = [name for name in names if name != "triton"]  # there it is Triton's interpreter
    return measured.choose(measured.read(), spec, num_heads, names) or next(name for name in _FALLBACK if name in names)
