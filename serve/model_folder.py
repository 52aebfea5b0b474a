"""Where the files of a model are, and of which kind it is, told as the errors of options."""

from __future__ import annotations

import contextlib
from pathlib import Path

from models.source import SourceError, kind_of, resolve
from serve.errors import ConfigError
from serve.options import ModelOptions, check_kind
from serve.ranks.split import check_split, read_geometry
from serve.ranks.text_geometry import GeometryError


def find_model(options: ModelOptions, kind: str | None = None) -> tuple[Path, str]:
    """The folder of the model's files, fetched if need be, and its kind.

    Raises ConfigError, also when it is not of `kind`, when an option is set that means nothing for its kind, or when
    it cannot be split as asked.
    """
    try:
        folder = resolve(options.model, options.revision, load_format=options.load_format)
        found = options.kind or kind_of(folder)
    except SourceError as error:
        raise ConfigError(f"model: {error}", param="model") from error
    if kind not in (None, found):
        raise ConfigError(f"{options.model!r} is no {kind} model, its kind is {found!r}; give another", param="model")
    try:
        check_kind(options, found)
        if options.num_ranks > 1:
            with contextlib.suppress(GeometryError):  # told when it is loaded
                check_split(options, read_geometry(folder, found))
    except ValueError as error:
        raise ConfigError(str(error), param=str(error).split()[0]) from None
    return folder, found
