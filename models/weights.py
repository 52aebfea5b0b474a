"""Weights from safetensors into a model's own storage: one tensor at a time, straight to its device, dtype and place.

A model offers `parameters()`, checkpoint name → storage, where several names may be slices of one fused matrix. Nothing
larger than one tensor exists twice. safetensors itself checks the bounds in its headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from models.weight_files import WeightsError, weight_files

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias")
"""Endings of tensors that old checkpoints carry though they follow from the config."""


def load_weights(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    *,
    unused: Iterable[str] = (),
    progress: Progress | None = None,
) -> None:
    """Fill `parameters` from the safetensors files of `folder`.

    `unused`: names that may be in the files without a place here (a stored copy of tied embeddings). Raises
    WeightsError when a tensor is missing, left over or of another shape, or a file is damaged or not there.
    """
    files = weight_files(folder)
    total = sum(file.stat().st_size for file in files)
    missing, allowed = dict(parameters), set(unused)
    left_over: list[str] = []
    done = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a handle, not a dict
                    target = missing.pop(name, None)
                    if target is not None:
                        tensor = tensors.get_tensor(name)
                        _fill(target, tensor, name, file)
                        done += tensor.nbytes
                        if progress is not None:
                            progress(done, total)
                    elif name not in allowed and not name.endswith(_DERIVED):
                        left_over.append(name)
        except SafetensorError as error:
            raise WeightsError(f"{file} cannot be read as safetensors ({error}); download it again") from error
    if missing:
        raise WeightsError(f"{folder} lacks {_some(missing)}; its weights do not belong to its config.json")
    if left_over:
        raise WeightsError(f"{folder} holds {_some(left_over)}, which the model of its config.json does not have")
    if progress is not None:
        progress(total, total)


def fill_dummy(parameters: Mapping[str, torch.Tensor], *, seed: int = 0, progress: Progress | None = None) -> None:
    """Random weights of the right shapes: matrices as at the start of training, norms one, biases zero."""
    total = sum(parameter.nbytes for parameter in parameters.values())
    done = 0
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.device not in generators:
                generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=generators[parameter.device])
            done += parameter.nbytes
            if progress is not None:
                progress(done, total)


def _fill(target: torch.Tensor, tensor: torch.Tensor, name: str, file: Path) -> None:
    """Copy into place; one row may stand for several (`q_norm` of every head)."""
    if target.shape != tensor.shape and target.shape[-tensor.dim() :] != tensor.shape:
        raise WeightsError(
            f"{file} holds {name} as {list(tensor.shape)}, the config asks for {list(target.shape)}; "
            f"the weights do not belong to this config.json"
        )
    with torch.no_grad():
        target.copy_(tensor)


def _some(names: Iterable[str]) -> str:
    """Up to three names and how many more."""
    listed = sorted(names)
    rest = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + rest
