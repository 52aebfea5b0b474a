"""Where a model's files are: a model that ships with the package, a folder, or the hub.

Only data is ever fetched or opened: safetensors, JSON, chat templates and sentencepiece vocabularies. Pickled weights
and a repository's own Python code (`auto_map`) could do anything to this machine, so they are not even downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from models.weights import WeightsError, weight_files

EMBEDDED = Path(__file__).parent / "embedded"
"""Every folder in it with a `config.json` is a model that ships, known by the folder's name."""

_TEXTS = ["*.json", "*.jinja", "*tokenizer.model", "*.txt"]
_WEIGHTS = ["*.safetensors"]
_COPIES = ["original/*", "onnx/*", "openvino/*", "consolidated*", "*.fp16.safetensors", "*.non_ema.safetensors"]
"""The same weights again, in layouts that are not read."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class SourceError(ValueError):
    """There is no usable model where one was named; the message says where it was looked for."""


def resolve(model: str, revision: str | None = None, *, load_format: str = "auto") -> Path:
    """The folder with the files of `model`: an embedded name, a path, or a hub id, downloaded if need be.

    The hub is asked through huggingface_hub, so its cache and environment hold (HF_HOME, HF_ENDPOINT, HF_TOKEN,
    HF_HUB_OFFLINE). `load_format` "dummy" needs and fetches no weights. Raises SourceError.
    """
    folder = _local(model)
    if folder is None:
        folder = _download(model, revision, with_weights=load_format != "dummy")
    kind = kind_of(folder)
    if kind == "text" and load_format != "dummy":
        try:
            weight_files(folder)
        except WeightsError as error:
            raise SourceError(str(error)) from error
    return folder


def kind_of(folder: Path) -> str:
    """ "text" or "image", by the file that describes the model. Raises SourceError when there is neither."""
    if (folder / "model_index.json").is_file():
        return "image"
    if (folder / "config.json").is_file():
        return "text"
    raise SourceError(
        f"{folder} holds neither config.json (a text model) nor model_index.json (an image model); "
        f"give the folder of a model in Hugging Face layout"
    )


def embedded_names() -> list[str]:
    """The models that ship with the package."""
    return sorted(config.parent.name for config in EMBEDDED.glob("*/config.json"))


def _local(model: str) -> Path | None:
    """The folder `model` names on this machine, or None for a hub id."""
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
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*_TEXTS, *_WEIGHTS] if with_weights else _TEXTS,
            ignore_patterns=_COPIES,
        )
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
