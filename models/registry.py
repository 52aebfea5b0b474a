"""From a checkpoint folder to a model with weights: the native decoder where its family is known, `hf.py` otherwise.

Native families need torch and safetensors only; transformers is imported when the first foreign architecture is met.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.parallel import ALONE, Place
from models.quantize import Quantization
from models.text import llama, mistral, qwen2, qwen3
from models.text.architecture import DenseArchitecture, read_eos
from models.text.base import CausalLM, ModelError
from models.text.decoder import Decoder
from models.text.decoder_rank import DecoderRank
from models.weights import Progress

NATIVE: dict[str, Callable[[dict[str, Any]], DenseArchitecture]] = {
    "LlamaForCausalLM": llama.read,
    "MistralForCausalLM": mistral.read,
    "Qwen2ForCausalLM": qwen2.read,
    "Qwen3ForCausalLM": qwen3.read,
}


def load_text_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    load_format: str = "auto",
    quantization: str | None = None,
    max_model_len: int | None = None,
    place: Place = ALONE,
    progress: Progress | None = None,
) -> CausalLM:
    """The language model in `folder`, ready to compute on `device`.

    `dtype` None: as stored. `load_format` "dummy": random weights. `quantization`: what the layers' matrices are
    quantised to as they are loaded (`models/quantize.py`); None: as stored. `max_model_len`: positions that will be
    served, where fewer than the model was made for (a smaller table of positions; LongRoPE chooses its factors by it).
    `place`: the rank whose part of the model is loaded and computed; all ranks load.
    Raises ModelError or WeightsError.
    """
    config = read_config(folder)
    read = NATIVE.get(architecture_name(config))
    scheme = Quantization.of(config, quantization, load_format=load_format)
    if read is None:
        if scheme.rules:
            raise ModelError(
                f"{folder} is a {architecture_name(config)}, whose layers are run by transformers and not quantised "
                f"here; quantised models are computed of {', '.join(NATIVE)}"
            )
        # Imported here: transformers takes as long to import as a small model takes to load.
        from models.text.hf import load_transformers

        return load_transformers(
            folder,
            config,
            device=device,
            dtype=dtype,
            load_format=load_format,
            max_model_len=max_model_len,
            place=place,
        )
    try:
        architecture = read(config)
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from error
    longest = architecture.spec.max_positions
    wanted, num_positions = dtype or architecture.spec.dtype, min(max_model_len or longest, longest)
    scheme.check(wanted, device, is_asked=quantization is not None and "quantization_config" not in config)
    given: Any = {"dtype": wanted, "device": device, "num_positions": num_positions, "quantization": scheme}
    model = Decoder(architecture, **given) if place.is_alone else DecoderRank(architecture, place, **given)
    model.load(folder, load_format=load_format, progress=progress)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, its end-of-sequence ids joined by those of `generation_config.json`. Raises ModelError."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder} has no config.json; give the folder of a model in Hugging Face layout")
    generation = _read_json(folder / "generation_config.json") or {}
    ids = dict.fromkeys((*read_eos(config), *read_eos(generation)))
    return {**config, "eos_token_id": list(ids)}


def architecture_name(config: dict[str, Any]) -> str:
    """The class name checkpoints are known by."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(
            f"architectures in config.json is {names!r}; a list with a class name is needed, as ['LlamaForCausalLM'] "
            f"(model_type is {config.get('model_type')!r})"
        )
    return names[0]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value
