"""A dense decoder described by data: what the families of Llama's line differ in, and nothing else.

A family file (`llama.py`, `qwen3.py`, …) turns its `config.json` into a `DenseArchitecture`; `decoder.py` computes any
of them. A family that needs more than these fields is another decoder, or goes through `hf.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.text.base import DecoderSpec
from models.text.rope import RopeSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class DenseArchitecture:
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

    spec: DecoderSpec
    intermediate_size: int
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    """Sliding window per layer, None where a layer sees everything before it."""
    ties_embeddings: bool
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False


def read_dense(
    config: dict[str, Any],
    *,
    windows: tuple[int | None, ...] | None = None,
    head_dim: int | None = None,
    ties_embeddings: bool = False,
    **differences: bool,
) -> DenseArchitecture:
    """The architecture of `config` (the parsed `config.json`), with what the family file knows better.

    `ties_embeddings`: the family's default where the file is silent. Raises ValueError naming what cannot be computed.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}; the native decoder computes 'silu'")
    num_heads = read_count(config, "num_attention_heads")
    num_layers = read_count(config, "num_hidden_layers")
    hidden_size = read_count(config, "hidden_size")
    head_dim = head_dim or int(config.get("head_dim") or hidden_size // num_heads)
    rope = RopeSpec.read(config, head_dim=head_dim)
    spec = DecoderSpec(
        architecture=(config.get("architectures") or [config["model_type"]])[0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        vocab_size=read_count(config, "vocab_size"),
        max_positions=rope.longest,
        eos_token_ids=read_eos(config),
        dtype=read_dtype(config),
    )
    return DenseArchitecture(
        spec=spec,
        intermediate_size=read_count(config, "intermediate_size"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        windows=windows or (None,) * num_layers,
        ties_embeddings=bool(config.get("tie_word_embeddings", ties_embeddings)),
        **differences,
    )


def qwen_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Sliding windows as Qwen2 and Qwen3 spell them: by `layer_types`, in older files by `max_window_layers`."""
    num_layers = read_count(config, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 28))
        return tuple(window if index >= first else None for index in range(num_layers))
    if len(kinds) < num_layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])


def read_count(config: dict[str, Any], key: str) -> int:
    """A positive whole number of the config. Raises ValueError naming the key."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; a positive whole number is needed")
    return value


def read_eos(config: dict[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` as a number, a list or nothing."""
    value = config.get("eos_token_id")
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)


def read_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype the weights are stored in, by its new or old name; float32 where the file is silent."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; stored weights may be {', '.join(DTYPES)}")
    return DTYPES[name]
