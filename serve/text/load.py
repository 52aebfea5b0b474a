"""From options to a model on its device, and the shape of its cache: the same for a driver and for its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.attention.base import AttentionBackend, KVCacheSpec
from models.attention.build import make_attention
from models.parallel import ALONE, Place
from models.registry import load_text_model
from models.text.base import CausalLM, ModelError
from models.weight_files import WeightsError
from models.weights import Progress
from serve.compute import choose_dtype
from serve.devices import device_name
from serve.errors import ConfigError
from serve.options import ModelOptions


def load_model(
    options: ModelOptions,
    folder: Path,
    device: torch.device,
    *,
    place: Place = ALONE,
    progress: Progress | None = None,
) -> CausalLM:
    """The part of the model in `folder` that `place` computes. Raises ConfigError."""
    try:
        return load_text_model(
            folder,
            device=device,
            dtype=choose_dtype(options, device),
            load_format=options.load_format,
            quantization=options.quantization,
            max_model_len=options.max_model_len,
            place=place,
            progress=progress,
        )
    except (ModelError, WeightsError, OSError) as error:
        raise ConfigError(f"model: {error}", param="model") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ConfigError(
            f"the weights of {options.model!r} do not fit the memory of {device}", param="model"
        ) from error


def cache_of(options: ModelOptions, model: CausalLM, device: torch.device) -> KVCacheSpec:
    """What this rank keeps of every position."""
    spec, kind = model.rank_spec, options.kv_cache_dtype
    kv_dtype = "fp8_e4m3" if kind == "fp8" else kind
    return KVCacheSpec(
        spec.num_layers,
        spec.num_kv_heads,
        spec.head_dim,
        options.block_size,
        spec.dtype,
        device,
        kv_dtype,
        caps_scores=getattr(model, "caps_scores", False),
    )


def attention_of(options: ModelOptions, cache: KVCacheSpec, num_heads: int) -> AttentionBackend:
    """Raises ConfigError when the backend asked for cannot compute with this cache."""
    try:
        return make_attention(options.attention_backend, cache, num_heads)
    except ValueError as error:
        raise ConfigError(f"attention_backend: {error}", param="attention_backend") from error


def held_by(model: CausalLM, device: torch.device) -> dict[str, Any]:
    """What a rank tells of its part. A model of transformers' own is whole on every rank, and does not count."""
    return {
        "device": device_name(str(device)),
        "weight_bytes": getattr(model, "weight_bytes", model.num_parameters * model.spec.dtype.itemsize),
        "bytes_read": getattr(model, "num_bytes_read", 0),
    }
