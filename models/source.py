"""Where a model's files are: a model that ships with the package, a folder, or the hub.

Only data is ever fetched or opened: safetensors, JSON, chat templates and sentencepiece vocabularies. Pickled weights
and a repository's own Python code (`auto_map`) could do anything to this machine, so they are not even downloaded.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from models.weight_files import WeightsError, weight_files

EMBEDDED = Path(__file__).parent / "embedded"
"""Every folder in it with a `config.json` or a `model_index.json` is a model that ships, known by the folder's name."""

_TEXTS = ["*.json", "*.jinja", "*tokenizer.model", "*spiece.model", "*.txt"]
_WEIGHTS = {"text": ["*.safetensors"], "image": ["*/*.safetensors"]}
"""Of an image model only those of its components: beside them the whole may lie again, for other programs."""
_COPIES = [
    "original/*",
    "onnx/*",
    "openvino/*",
    "consolidated*",
    "*.fp16.safetensors",
    "*.fp16-*.safetensors",
    "*.safetensors.index.fp16.json",
    "*.non_ema.safetensors",
]
"""The same weights again, in layouts that are not read or as variants of the plain files."""

_DESCRIPTIONS = {"model_index.json": "image", "config.json": "text"}
"""Which file describes a model, and of which kind it is then. A folder with both is an image model."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class SourceError(ValueError):
    """There is no usable model where one was named; the message says where it was looked for."""


def resolve(model: str, revision: str | None = None, *, load_format: str = "auto") -> Path:
    """The folder with the files of `model`: an embedded name, a path, or a hub id, downloaded if need be.

    The hub is asked through huggingface_hub, so its cache and environment hold (HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE). `load_format` "dummy" needs and fetches no weights. Raises SourceError.
    """
    folder = local_folder(model)
    if folder is None:
        folder = _download(model, revision, with_weights=load_format != "dummy")
    _require_files(folder, load_format)
    return folder


def check_local(model: str, *, load_format: str = "auto") -> None:
    """Raise SourceError when `model` names a place on this machine that holds no model.

    Cheap, so that a mistyped path is refused before anything starts. A hub id passes: that takes asking the hub.
    """
    folder = local_folder(model)
    if folder is not None:
        _require_files(folder, load_format)


def local_kind(model: str) -> str | None:
    """ "text" or "image" for a model on this machine; None for a hub id. Raises SourceError."""
    folder = local_folder(model)
    return None if folder is None else kind_of(folder)


def local_folder(model: str) -> Path | None:
    """The folder `model` names on this machine, or None for a hub id. Raises SourceError for what is neither."""
    if model in embedded_names():
        return EMBEDDED / model
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise SourceError(f"{model!r} is a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(model):
        raise SourceError(
            f"{model!r} is not a folder on this machine, and not a hub id (organisation/name) either; check the path"
        )
    return None


def kind_of(folder: Path) -> str:
    """ "text" or "image", by the file that describes the model. Raises SourceError when there is neither."""
    for name, kind in _DESCRIPTIONS.items():
        if (folder / name).is_file():
            return kind
    raise SourceError(
        f"{folder} holds neither config.json (a text model) nor model_index.json (an image model); "
        f"give the folder of a model in Hugging Face layout"
    )


def embedded_names() -> list[str]:
    """The models that ship with the package."""
    return sorted({config.parent.name for name in _DESCRIPTIONS for config in EMBEDDED.glob(f"*/{name}")})


def _require_files(folder: Path, load_format: str) -> None:
    networks = [(folder, "model")] if kind_of(folder) == "text" else _networks(folder)
    if load_format != "dummy":
        try:
            for place, stem in networks:
                weight_files(place, stem)
        except WeightsError as error:
            raise SourceError(str(error)) from error


def _networks(folder: Path) -> list[tuple[Path, str]]:
    """Where an image model keeps weights: the folders of its components that have a network's config, each with how
    its weight files begin. Raises SourceError for an index that is not one."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        described = [(name, value[0]) for name, value in index.items() if isinstance(value, list) and len(value) == 2]
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"{path} cannot be read ({error}); download it again") from error
    # Written by the class that stored it, so the library tells; schedulers and tokenizers have other descriptions.
    return [
        (folder / name, "diffusion_pytorch_model" if library == "diffusers" else "model")
        for name, library in described
        if (folder / name / "config.json").is_file()
    ]


def _download(model: str, revision: str | None, *, with_weights: bool) -> Path:
    # Imported here: a start from a folder needs none of it (0.3 s).
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    looked = f"{model!r} is not an embedded model ({', '.join(embedded_names()) or 'none'}) and not a folder here"
    fetch = partial(snapshot_download, model, revision=revision, ignore_patterns=_COPIES)
    try:
        folder = fetch(allow_patterns=_TEXTS)
        if with_weights:
            folder = fetch(allow_patterns=[*_TEXTS, *_WEIGHTS[kind_of(Path(folder))]])
    except GatedRepoError as error:
        raise SourceError(
            f"the hub gives {model!r} only to accounts that accepted its licence; accept it there and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{looked}, and the hub does not have it (or not for this HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model!r} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{looked}; the hub could not be asked (offline, or HF_HUB_OFFLINE is set) and its cache does not hold "
            f"the whole model"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(f"{looked}, and fetching it from the hub failed: {error}") from error
    return Path(folder)
