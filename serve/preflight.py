"""What can be known to be wrong before any process starts: keys, exposure, a path that leads to no model, an option
that means nothing for its model.

Everything else about a model shows when its replica loads it, with the same kind of sentence but some seconds later.
"""

from __future__ import annotations

import dataclasses

from models.source import SourceError, check_local, local_kind
from serve.errors import ConfigError
from serve.gateway.auth import settle_keys
from serve.options import ServeOptions, check_kind


def settle(options: ServeOptions, *, loads_here: bool) -> ServeOptions:
    """`options` with the gateway's keys read from their file and the environment. Raises ConfigError.

    `loads_here`: models are read on this machine; else their folders are the business of the cluster's nodes.
    """
    settled = dataclasses.replace(options, gateway=settle_keys(options.gateway))
    for model in options.models if loads_here else ():
        try:
            check_local(model.model, load_format=model.load_format)
            kind = model.kind or local_kind(model.model)
        except SourceError as error:
            raise ConfigError(f"model: {error}", param="model") from None
        if kind is not None:
            try:
                check_kind(model, kind)
            except ValueError as error:
                raise ConfigError(str(error)) from None
    return settled
