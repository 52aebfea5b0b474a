"""What can be known to be wrong before any process starts: keys, exposure, a path that leads to no model, an option
that means nothing for its model, a split that is impossible for the model or for this machine.

Everything else about a model shows when its replica loads it, with the same kind of sentence but some seconds later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from models.source import SourceError, check_local, kind_of, local_folder, local_kind
from serve.errors import ConfigError
from serve.gateway.auth import ENVIRONMENT_KEY, settle_keys
from serve.options import ModelOptions, ServeOptions, check_kind
from serve.ranks.split import Geometry, check_split, read_geometry
from serve.ranks.text_geometry import GeometryError


def settle(options: ServeOptions, *, loads_here: bool) -> ServeOptions:
    """`options` with the gateway's keys read from their file and the environment, where they are no more then: whoever
    loads a model's code inherits it. Raises ConfigError.

    `loads_here`: models are read on this machine; else their folders are the business of the cluster's nodes.
    """
    settled = dataclasses.replace(options, gateway=settle_keys(options.gateway))
    os.environ.pop(ENVIRONMENT_KEY, None)
    for model in options.models if loads_here else ():
        check_model(model)
        check_machine(model)
    return settled


def check_model(model: ModelOptions) -> None:
    """Raise ConfigError for what a model on this machine can be told not to be or to do. A hub id passes."""
    try:
        check_local(model.model, load_format=model.load_format)
        kind = model.kind or local_kind(model.model)
    except SourceError as error:
        raise ConfigError(f"model: {error}", param="model") from None
    if kind is None:
        return
    with _told_by_option():
        check_kind(model, kind)
        geometry = _geometry(model)
        if geometry is not None:
            check_split(model, geometry)


def check_machine(model: ModelOptions) -> None:
    """Raise ConfigError when this machine has not the devices or the memory for a model's ranks."""
    if model.num_ranks == 1:
        return
    from serve.machine import check_devices, check_room, computes_on_cuda  # torch, which takes seconds to import

    with _told_by_option():
        check_devices(model)
        geometry = _geometry(model, on_cuda=computes_on_cuda(model))
        if geometry is not None:
            check_room(model, geometry)


def _geometry(model: ModelOptions, *, on_cuda: bool = False) -> Geometry | None:
    """Of a model that several ranks are to compute; None where it is not known before it is loaded."""
    folder = local_folder(model.model)
    if model.num_ranks == 1 or folder is None:
        return None
    with contextlib.suppress(GeometryError):
        return read_geometry(
            folder,
            model.kind or kind_of(folder),
            dtype=model.dtype,
            on_cuda=on_cuda,
            quantization=model.quantization,
        )
    return None


@contextlib.contextmanager
def _told_by_option() -> Iterator[None]:
    """A ValueError's first word is the option that is wrong."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error), param=str(error).split()[0]) from None
