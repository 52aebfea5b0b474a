"""Puts a diffusion transformer on several ranks: starts the peers, and has all load their parts at the same time."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.dit.checkpoint import DiTError
from models.dit.grid import Grid, Split
from models.dit.part import Part
from models.dit.pipeline import StockPipeline
from models.dit.registry import check_split, load_dit, load_part
from serve.compute import choose_dtype
from serve.devices import device_name
from serve.errors import ConfigError
from serve.image.ranked import RankedDiT
from serve.options import ModelOptions
from serve.ranks.group import RankGroup
from serve.ranks.launch import Launcher, LocalLauncher
from serve.ranks.spec import WORKERS
from serve.request import RankCard

log = logging.getLogger(__name__)

_SIZES = ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree")


def load_ranked(
    options: ModelOptions, folder: Path, device: torch.device, *, threads: int, launcher: Launcher | None = None
) -> tuple[RankedDiT, tuple[RankCard, ...]]:
    """The model, of which this process becomes the driver, and what each rank holds.

    `threads`: of each peer on CPU until the model's size is known. Raises ConfigError, also what a peer raised, and
    EngineDead.
    """
    split = Split(options.tensor_parallel_size, options.cfg_parallel_size, options.ulysses_degree)
    _check(options, folder, split)
    launcher = launcher or LocalLauncher()
    if device.type == "cuda" and isinstance(launcher, LocalLauncher) and torch.cuda.device_count() < split.num_ranks:
        raise ConfigError(
            f"{_asked(options)}: {split.num_ranks} ranks take as many devices, but this machine shows "
            f"{torch.cuda.device_count()}",
            param=_asked(options).split()[0],
        )
    devices = launcher.devices(device.type, split.num_ranks)
    group = RankGroup.start(WORKERS["image"], devices, threads=threads, launcher=launcher)
    try:
        return _load(options, folder, torch.device(devices[0]), split, group)
    except BaseException:
        group.close()
        raise


def _check(options: ModelOptions, folder: Path, split: Split) -> None:
    try:
        check_split(folder, split)
    except DiTError as error:
        message = str(error) if str(error).startswith(_SIZES) else f"{_asked(options)}, but {error}"
        raise ConfigError(message, param=message.split()[0]) from error


def _asked(options: ModelOptions) -> str:
    """The sizes as the user gave them."""
    return ", ".join(f"{name} is {getattr(options, name)}" for name in _SIZES if getattr(options, name) > 1)


def _load(
    options: ModelOptions, folder: Path, device: torch.device, split: Split, group: RankGroup
) -> tuple[RankedDiT, tuple[RankCard, ...]]:
    dtype = choose_dtype(options, device)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    replies = group.begin("load", folder=str(folder), split=asdict(split), dtype=name, load_format=options.load_format)
    try:
        how: dict[str, Any] = {"device": device, "dtype": dtype, "load_format": options.load_format}
        part: Part = load_part(folder, Grid.join(split, 0), **how)
        model = load_dit(folder, part=part, **how)
    except RuntimeError as error:
        raise group.explain(error) from error
    assert not isinstance(model, StockPipeline), "the split was checked"
    # The driver has text encoders and VAE beside its part.
    own = {
        "device": device_name(str(device)),
        "weight_bytes": model.num_parameters * model.spec.dtype.itemsize,
        "bytes_read": part.bytes_read,
    }
    cards = []
    for rank, held in enumerate([own, *replies.wait()]):
        cards.append(RankCard(rank=rank, **held))
        log.info(
            "rank ready model=%s rank=%d device=%s weight_bytes=%d bytes_read=%d",
            *(options.name, rank, held["device"], held["weight_bytes"], held["bytes_read"]),
        )
    return RankedDiT(model, part, group), tuple(cards)
