"""Qwen3: Llama's layers with RMSNorm on every query and key head, no bias, and a head dimension of its own."""

from __future__ import annotations

from typing import Any

from models.text.architecture import DenseArchitecture, qwen_windows, read_dense


def read(config: dict[str, Any]) -> DenseArchitecture:
    has_bias = bool(config.get("attention_bias", False))
    return read_dense(
        config,
        windows=qwen_windows(config),
        head_dim=int(config.get("head_dim") or 128),
        has_qk_norm=True,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )
