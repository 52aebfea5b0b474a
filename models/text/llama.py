"""Llama 2, 3 and what shares their layout (TinyLlama, SmolLM2, Yi, DeepSeek-LLM 7B, …)."""

from __future__ import annotations

from typing import Any

from models.text.architecture import DenseArchitecture, read_dense


def read(config: dict[str, Any]) -> DenseArchitecture:
    has_bias = bool(config.get("attention_bias", False))
    return read_dense(
        config,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
    )
