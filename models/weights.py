"""Weights from safetensors into a model's own storage: one tensor at a time, straight to its device, dtype and place.

A model offers `parameters()`, checkpoint name → storage, where several names may be slices of one fused matrix. Nothing
larger than one tensor exists twice; a storage may keep what it is given in another form (`models/quantized`).
safetensors itself checks the bounds in its headers. A rank that holds part of a model says which part of a tensor its
storage is (`Cut`), and only that is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from models.weight_files import WeightsError, weight_files

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

_DERIVED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".weight_shape")
"""Endings of tensors that checkpoints carry though they follow from the config."""
_CALIBRATED = (".input_scale", ".activation_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
"""Endings of scales for activations and caches, which are scaled here by what they hold."""

_DUMMY_ELEMENTS = 1 << 22
"""Random numbers from one seed: what a rank has to make beside its own, at most."""


class Storage(Protocol):
    """Where a checkpoint's tensor goes. A `torch.Tensor` is one."""

    @property
    def shape(self) -> torch.Size:
        """Of the checkpoint's tensor, or of its part that is kept here."""
        ...

    @property
    def nbytes(self) -> int:
        """That are held of it."""
        ...

    @property
    def device(self) -> torch.device: ...

    def numel(self) -> int:
        """Parameters of the model that it stands for."""
        ...

    def copy_(self, tensor: torch.Tensor, /) -> Any:
        """Take `tensor`, of this shape."""
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a checkpoint's tensor a storage is: from `start` on along `dim` (0 or 1), as long as it is."""

    dim: int
    start: int

    def index(self, storage: Storage) -> tuple[slice, ...]:
        """Of the part, in the whole tensor."""
        part = slice(self.start, self.start + storage.shape[self.dim])
        return (slice(None), part) if self.dim else (part,)


def load_weights(
    folder: Path,
    parameters: Mapping[str, Storage],
    *,
    cuts: Mapping[str, Cut] | None = None,
    whole: Mapping[str, torch.Size] | None = None,
    unused: Iterable[str] = (),
    progress: Progress | None = None,
) -> int:
    """Fill `parameters` from the safetensors files of `folder`; the bytes of them that were read.

    `cuts`: of the tensors that `parameters` hold a part of. `whole`: name and shape of every tensor of the model where
    `parameters` are not all of it. `unused`: names that may be in the files without a place here (a stored copy of
    tied embeddings). Raises WeightsError when a tensor is missing, left over or of another shape, before any is read,
    or when a file is damaged or not there.
    """
    files = weight_files(folder)
    whole = {name: storage.shape for name, storage in parameters.items()} if whole is None else whole
    _check(folder, files, whole, set(unused))
    total = sum(storage.nbytes for storage in parameters.values())
    done = num_read = 0
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a handle, not a dict
                storage, cut = parameters.get(name), (cuts or {}).get(name)
                if storage is None:
                    continue
                tensor = tensors.get_slice(name)[cut.index(storage)] if cut else tensors.get_tensor(name)
                with torch.no_grad():
                    storage.copy_(tensor)
                num_read += tensor.nbytes
                done += storage.nbytes
                if progress is not None:
                    progress(done, total)
    if progress is not None:
        progress(total, total)
    return num_read


def fill_dummy(
    parameters: Mapping[str, Storage],
    *,
    cuts: Mapping[str, Cut] | None = None,
    whole: Mapping[str, torch.Size] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Random weights of the right shapes: matrices as at the start of training, norms one, biases zero.

    A rank's are the same numbers as in the whole model. `cuts` and `whole` as for `load_weights`.
    """
    total = sum(storage.nbytes for storage in parameters.values())
    done = 0
    with torch.no_grad():
        for name, storage in parameters.items():
            is_plain = isinstance(storage, torch.Tensor)
            parameter = storage if is_plain else torch.empty(storage.shape, device=storage.device)
            assert isinstance(parameter, torch.Tensor)
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                shape = parameter.shape if whole is None else whole[name]
                _fill_normal(parameter, f"{seed}/{name}", shape, (cuts or {}).get(name))
            if not is_plain:
                storage.copy_(parameter)
            done += storage.nbytes
            if progress is not None:
                progress(done, total)


def _check(folder: Path, files: list[Path], whole: Mapping[str, torch.Size], allowed: set[str]) -> None:
    """Raise WeightsError unless the files hold `whole`, by their headers; one row may stand for several (`q_norm`)."""
    found: set[str] = set()
    left_over: list[str] = []
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a handle, not a dict
                found.add(name)
                if name not in whole:
                    if name not in allowed and not name.endswith(_DERIVED + _CALIBRATED):
                        left_over.append(name)
                    continue
                stored, wanted = tensors.get_slice(name).get_shape(), list(whole[name])
                if stored != wanted and wanted[len(wanted) - len(stored) :] != stored:
                    raise WeightsError(
                        f"{file} holds {name} as {stored}, the config asks for {wanted}; "
                        f"the weights do not belong to this config.json"
                    )
    missing = [name for name in whole if name not in found]
    if missing:
        raise WeightsError(f"{folder} lacks {_some(missing)}; its weights do not belong to its config.json")
    if left_over:
        raise WeightsError(f"{folder} holds {_some(left_over)}, which the model of its config.json does not have")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise WeightsError(f"{file} cannot be read as safetensors ({error}); download it again") from error


def _fill_normal(storage: torch.Tensor, key: str, shape: torch.Size, cut: Cut | None) -> None:
    """Numbers that depend on `key` and on where in `shape` they lie: rows in groups, every group from its own seed."""
    num_rows, num_columns = shape[0], max(1, shape[1:].numel())
    start, stop = (cut.start, cut.start + storage.shape[0]) if cut and cut.dim == 0 else (0, num_rows)
    each = max(1, _DUMMY_ELEMENTS // num_columns)
    generator = torch.Generator(storage.device)
    for first in range(start // each * each, stop, each):
        last = min(first + each, num_rows)
        generator.manual_seed(zlib.crc32(f"{key}/{first}".encode()))
        low, high = max(first, start), min(last, stop)
        own = storage[low - start : high - start]
        if own.shape == (last - first, *shape[1:]):
            own.normal_(0.0, 0.02, generator=generator)
            continue
        group = storage.new_empty(last - first, *shape[1:]).normal_(0.0, 0.02, generator=generator)
        group = group[low - first : high - first]
        own.copy_(group[cut.index(storage)] if cut and cut.dim == 1 else group)


def _some(names: Iterable[str]) -> str:
    """Up to three names and how many more."""
    listed = sorted(names)
    rest = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + rest
