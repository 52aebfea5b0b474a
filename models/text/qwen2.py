"""Qwen2 and Qwen2.5: Llama's layers with a bias on queries, keys and values."""

from __future__ import annotations

from typing import Any

from models.text.architecture import DenseArchitecture, qwen_windows, read_dense


def read(config: dict[str, Any]) -> DenseArchitecture:
    return read_dense(config, windows=qwen_windows(config), has_qkv_bias=True)
