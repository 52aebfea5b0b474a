"""From a folder in diffusers' layout to a pipeline object with its components, and nothing but data is read.

`model_index.json` names a class for every component. Only classes of diffusers and transformers are accepted, weights
only as safetensors; a pipeline or component with code of its own is refused. Every weight must be there: what diffusers
would fill with random numbers and a warning is an error here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from models.weight_files import WeightsError, weight_files

_CHOOSES_CODE = re.compile(r"Auto(?!encoder)")
"""Classes that pick another by what the folder says (AutoModel), which may be code in the folder."""


class DiTError(ValueError):
    """The folder is no image model that can be computed here; the message says what is wrong and what would help."""


@dataclass(frozen=True, slots=True)
class PipelineIndex:
    """What `model_index.json` says."""

    folder: Path
    class_name: str
    components: Mapping[str, tuple[str, str] | None]
    """Name → (library, class); None where the model does without."""
    values: Mapping[str, Any]
    """Other arguments of the pipeline."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Raises DiTError."""
        return read_json(self.folder / "scheduler" / "scheduler_config.json")


def read_index(folder: Path) -> PipelineIndex:
    """Raises DiTError."""
    path = folder / "model_index.json"
    index = read_json(path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise DiTError(f"{path} names the pipeline {class_name!r}; diffusers classes are run only")
    components: dict[str, tuple[str, str] | None] = {}
    values: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2):
            values[name] = value
        elif value == [None, None]:
            components[name] = None
        else:
            components[name] = (str(value[0]), str(value[1]))
    return PipelineIndex(folder, class_name, components, values)


def load_pipeline(
    index: PipelineIndex,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str,
    loaded: Mapping[str, Any] | None = None,
) -> Any:
    """The pipeline with its components, ready to compute. `load_format` "dummy": random weights. Raises DiTError.

    `loaded`: components that are there already.
    """
    silence_libraries()
    pipeline_class = pipeline_class_of(index)
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if loaded and name in loaded:
            arguments[name] = loaded[name]
        elif name in index.components:
            described = index.components[name]
            arguments[name] = (
                None
                if described is None
                else _load_component(index.folder, name, *described, device, dtype, load_format)
            )
        elif name in index.values:
            arguments[name] = index.values[name]
        elif parameter.default is inspect.Parameter.empty:
            if name not in pipeline_class._optional_components:
                raise DiTError(
                    f"{index.folder / 'model_index.json'} names no {name}, which {index.class_name} needs; "
                    f"download the whole model"
                )
            arguments[name] = None
    pipeline = pipeline_class(**arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_class_of(index: PipelineIndex) -> type[Any]:
    """Raises DiTError for a name that is no pipeline of the installed diffusers."""
    found = getattr(diffusers, index.class_name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise DiTError(
            f"{index.folder / 'model_index.json'} asks for the pipeline {index.class_name!r}, which diffusers "
            f"{diffusers.__version__} does not have; install a version that does"
        )
    return found


def silence_libraries() -> None:
    """Both draw progress bars, and write the text of prompts that they cut into their log."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises DiTError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DiTError(f"{path} is not there; download the whole model") from None
    except (OSError, ValueError) as error:
        raise DiTError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise DiTError(f"{path} holds no JSON object; download it again")
    return value


def fill_dummy_parameter(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """A weight of a model that was never trained."""
    if parameter.dim() > 1:
        parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _load_component(
    folder: Path, name: str, library: str, class_name: str, device: torch.device, dtype: torch.dtype, load_format: str
) -> Any:
    model_class = component_class(folder, name, library, class_name)
    place = folder / name
    if not place.is_dir() or place.parent != folder:
        raise DiTError(f"{place} is not there; download the whole model ({class_name})")
    try:
        if not issubclass(model_class, nn.Module):
            return model_class.from_pretrained(place, local_files_only=True)
        if load_format == "dummy":
            model = _build_dummy(model_class, place, device)
        else:
            model = _load_model(model_class, place, dtype)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, DiTError):
            raise
        raise DiTError(f"{place} cannot be loaded as {class_name}: {error}") from error
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def component_class(folder: Path, name: str, library: str, class_name: str) -> type[Any]:
    """The class, of diffusers or transformers and with weights or files of a known kind. Raises DiTError."""
    homes = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library) or (getattr(diffusers.pipelines, library, None) if library.isidentifier() else None)
    found = getattr(home, class_name, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained") or _CHOOSES_CODE.match(class_name):
        raise DiTError(
            f"{folder / 'model_index.json'} asks for {library}.{class_name} as its {name}; only model classes of "
            f"diffusers {diffusers.__version__} and transformers {transformers.__version__} are loaded"
        )
    return found


def _load_model(model_class: type[Any], place: Path, dtype: torch.dtype) -> nn.Module:
    is_transformers = issubclass(model_class, transformers.PreTrainedModel)
    try:
        weight_files(place, "model" if is_transformers else "diffusion_pytorch_model")
    except WeightsError as error:
        raise DiTError(str(error)) from error
    model, loaded = model_class.from_pretrained(
        place,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **{"dtype" if is_transformers else "torch_dtype": dtype},
    )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise DiTError(
            f"{place} lacks {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; "
            f"its weights do not belong to its config.json"
        )
    return model


def _build_dummy(model_class: type[Any], place: Path, device: torch.device) -> nn.Module:
    """From the config alone. Every matrix is random, also where training would start at zero (a picture would be blank
    then), and as large as keeps activations near one."""
    with device:
        if issubclass(model_class, transformers.PreTrainedModel):
            config: Any = model_class.config_class
            model: nn.Module = model_class(config.from_pretrained(place))
        else:
            model = model_class.from_config(model_class.load_config(place, local_files_only=True))
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_dummy_parameter(name, parameter, generator)
    return model
