"""Mistral 7B, Nemo, Small: Llama's layers, and a sliding window over all of them where the config gives one."""

from __future__ import annotations

from typing import Any

from models.text.architecture import DenseArchitecture, read_count, read_dense


def read(config: dict[str, Any]) -> DenseArchitecture:
    # transformers' default for a file that does not name the window is 4096 (Mistral 7B v0.1).
    window = config.get("sliding_window", 4096)
    return read_dense(config, windows=(window,) * read_count(config, "num_hidden_layers"))
