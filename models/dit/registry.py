"""From a folder with `model_index.json` to a model: a family's adapter where there is one, else the stock pipeline.

A checkpoint says what it is and how it was trained; what to ask of it by default stands in its pipeline's code. A
`tandem.json` beside `model_index.json` may say it instead, for a model whose good settings are others.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from models.dit.base import DiT, DiTSpec
from models.dit.checkpoint import (
    DiTError,
    PipelineIndex,
    component_class,
    load_pipeline,
    pipeline_class_of,
    read_index,
    read_json,
    silence_libraries,
)
from models.dit.class_conditional import RECIPE as CLASS_CONDITIONAL
from models.dit.class_conditional import ClassConditionalDiT
from models.dit.grid import Grid, Split
from models.dit.part import Part, Recipe, build_part
from models.dit.pipeline import NotSteppable, PipelineSpec, StockPipeline, step_parameters
from models.dit.sd3 import RECIPE as STABLE_DIFFUSION_3
from models.dit.sd3 import StableDiffusion3
from models.kernels.available import has_kernels

Prediction = Literal["flow", "epsilon"]

_FLOW_SOLVERS = ("flow_match_euler", "flow_match_euler_stochastic")
_EPSILON_SOLVERS = ("ddim", "euler", "euler_ancestral")
_OWN_SOLVERS: dict[str, tuple[Prediction, str]] = {
    "FlowMatchEulerDiscreteScheduler": ("flow", "flow_match_euler"),
    "DDIMScheduler": ("epsilon", "ddim"),
    "EulerDiscreteScheduler": ("epsilon", "euler"),
    "EulerAncestralDiscreteScheduler": ("epsilon", "euler_ancestral"),
}
"""Schedulers of diffusers: what they take a model to predict, and the solver that computes the same."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What is computed when a request does not say: `tandem.json`, else what the pipeline's code has."""

    num_inference_steps: int
    guidance_scale: float
    width: int | None = None
    height: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    max_sequence_length: int = 256
    """Of the T5 encoder of Stable Diffusion 3, or of the zeros in its place; diffusers' default."""


def load_dit(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    load_format: str = "auto",
    part: Part | None = None,
) -> DiT | StockPipeline:
    """The image model in `folder`, ready to compute on `device`.

    `dtype` None: float32, as diffusers does when not told. `load_format` "dummy": random weights, no files of weights
    are read. `part`: this rank's, to stand for the transformer; what then predicts is the part. Raises DiTError.
    """
    index = read_index(folder)
    pipeline_class = pipeline_class_of(index)
    defaults = _read_defaults(folder, pipeline_class)
    family = _FAMILIES.get(index.class_name)
    if family is None:
        try:
            step_parameters(pipeline_class)
        except NotSteppable as error:
            raise DiTError(f"{error}; families with an adapter are {', '.join(sorted(_FAMILIES))}") from error
    else:
        _own_solver(index)
    loaded = {} if part is None else {"transformer": part.transformer}
    pipeline = load_pipeline(index, device=device, dtype=dtype or torch.float32, load_format=load_format, loaded=loaded)
    transformer = getattr(pipeline, "transformer", None)
    if transformer is not None and part is None and has_kernels(device):
        from models.dit.fused_blocks import fuse_blocks

        fuse_blocks(transformer)
    return (family.build if family else _stock)(pipeline, index, defaults)


def check_split(folder: Path, split: Split) -> None:
    """Raise DiTError when ranks cannot share the model in `folder` that way. Reads no weights."""
    index = read_index(folder)
    if index.class_name not in _FAMILIES or index.components.get("transformer") is None:
        raise DiTError(
            f"{index.class_name} runs by its own code, which computes on one device; families that {split.num_ranks} "
            f"ranks can share are {', '.join(sorted(_FAMILIES))}"
        )
    num_heads = read_json(folder / "transformer" / "config.json").get("num_attention_heads")
    if not isinstance(num_heads, int):
        raise DiTError(f"{folder / 'transformer' / 'config.json'} names no num_attention_heads; download it again")
    try:
        split.check(num_heads)
    except ValueError as error:
        raise DiTError(str(error)) from error


def load_part(
    folder: Path,
    grid: Grid,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    load_format: str = "auto",
) -> Part:
    """What a rank computes of the transformer in `folder`. Raises DiTError."""
    check_split(folder, grid.split)
    silence_libraries()
    index = read_index(folder)
    described = index.components["transformer"]
    assert described is not None
    return build_part(
        component_class(folder, "transformer", *described),
        folder / "transformer",
        _FAMILIES[index.class_name].recipe,
        grid,
        device=device,
        dtype=dtype or torch.float32,
        load_format=load_format,
    )


def _class_conditional(pipeline: Any, index: PipelineIndex, defaults: Defaults) -> DiT:
    _require(pipeline, index, "transformer", "vae", "scheduler")
    side = pipeline.transformer.config.sample_size * _factor(pipeline)
    defaults = _at_most_one_size(index.folder, defaults, side)
    spec = _spec(pipeline, index, defaults, side=side, size_multiple=side, max_side=side)
    return ClassConditionalDiT(pipeline, spec, index.values.get("id2label") or {})


def _stable_diffusion_3(pipeline: Any, index: PipelineIndex, defaults: Defaults) -> DiT:
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    _require(pipeline, index, "transformer", "vae", "scheduler", *encoders)
    config = pipeline.transformer.config
    multiple = config.patch_size * _factor(pipeline)
    side = config.sample_size * _factor(pipeline)
    spec = _spec(
        pipeline, index, defaults, side=side, size_multiple=multiple, max_side=config.pos_embed_max_size * multiple
    )
    return StableDiffusion3(pipeline, spec, defaults.max_sequence_length)


@dataclass(frozen=True, slots=True)
class _Family:
    build: Callable[[Any, PipelineIndex, Defaults], DiT]
    recipe: Recipe


_FAMILIES = {
    "DiTPipeline": _Family(_class_conditional, CLASS_CONDITIONAL),
    "StableDiffusion3Pipeline": _Family(_stable_diffusion_3, STABLE_DIFFUSION_3),
}


def _stock(pipeline: Any, index: PipelineIndex, defaults: Defaults) -> StockPipeline:
    _require(pipeline, index, "scheduler")
    parameters = step_parameters(type(pipeline))
    factor = getattr(pipeline, "vae_scale_factor", None) or 8
    side = getattr(pipeline, "default_sample_size", None)
    width = defaults.width or (side and side * factor)
    height = defaults.height or (side and side * factor)
    if not width or not height:
        raise DiTError(
            f"{type(pipeline).__name__} names no usual size; put width and height into {index.folder / 'tandem.json'}"
        )
    has_size = "width" in parameters and "height" in parameters
    guidance = parameters.get("guidance_scale")
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    return StockPipeline(
        pipeline,
        PipelineSpec(
            dtype=denoiser.dtype if denoiser is not None else torch.float32,
            width=width,
            height=height,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            # Nearly every transformer cuts its latents into patches of two; UNets need multiples of eight pixels.
            size_multiple=max(8, 2 * factor),
            # No pipeline says where it ends. Twice the usual side is what positions are commonly stretched to.
            max_pixels=4 * width * height,
            solvers=(type(pipeline.scheduler).__name__,),
            sizes=defaults.sizes if has_size else ((width, height),),
            has_guidance=guidance is not None and guidance.default is not None,
            # Pipelines with a second scale take the negative prompt for that one, which requests do not have.
            has_negative_prompt="negative_prompt" in parameters and "true_cfg_scale" not in parameters,
        ),
    )


def _spec(
    pipeline: Any,
    index: PipelineIndex,
    defaults: Defaults,
    *,
    side: int,
    size_multiple: int,
    max_side: int,
) -> DiTSpec:
    prediction, solver = _own_solver(index)
    others = _FLOW_SOLVERS if prediction == "flow" else _EPSILON_SOLVERS
    spec = DiTSpec(
        prediction=prediction,
        dtype=pipeline.transformer.dtype,
        width=defaults.width or side,
        height=defaults.height or side,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        size_multiple=size_multiple,
        max_pixels=max_side * max_side,
        solvers=tuple(dict.fromkeys((solver, *others))),
        solver_config=index.scheduler_config,
        sizes=defaults.sizes,
        max_side=max_side,
    )
    for width, height in ((spec.width, spec.height), *spec.sizes):
        if width % size_multiple or height % size_multiple or max(width, height) > max_side:
            raise DiTError(
                f"{index.folder / 'tandem.json'} names the size {width}x{height}; sides of this model are multiples of "
                f"{size_multiple} up to {max_side}"
            )
    return spec


def _own_solver(index: PipelineIndex) -> tuple[Prediction, str]:
    """What the model predicts, and the solver that computes what its scheduler does. Raises DiTError."""
    scheduler = index.components.get("scheduler")
    found = _OWN_SOLVERS.get(scheduler[1]) if scheduler else None
    if found is None:
        raise DiTError(
            f"{index.folder} comes with the scheduler {scheduler[1] if scheduler else None}, which no solver here "
            f"computes; replace its scheduler folder by one of {', '.join(_OWN_SOLVERS)}"
        )
    prediction, solver = found
    is_stochastic = index.scheduler_config.get("stochastic_sampling", False)
    return prediction, "flow_match_euler_stochastic" if is_stochastic else solver


def _at_most_one_size(folder: Path, defaults: Defaults, side: int) -> Defaults:
    asked = {*defaults.sizes, (defaults.width or side, defaults.height or side)}
    if asked != {(side, side)}:
        raise DiTError(f"{folder / 'tandem.json'} names other sizes than {side}x{side}, the only one this model makes")
    return Defaults(defaults.num_inference_steps, defaults.guidance_scale, side, side, ((side, side),))


def _factor(pipeline: Any) -> int:
    """Pixels per latent element, each way."""
    factor: int = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return factor


def _require(pipeline: Any, index: PipelineIndex, *names: str) -> None:
    missing = [name for name in names if getattr(pipeline, name, None) is None]
    if missing:
        raise DiTError(
            f"{index.folder / 'model_index.json'} leaves out {', '.join(missing)}, which {index.class_name} needs; "
            f"use a copy that has them"
        )


def _read_defaults(folder: Path, pipeline_class: type[Any]) -> Defaults:
    parameters = inspect.signature(pipeline_class.__call__).parameters
    steps, guidance = (parameters.get(name) for name in ("num_inference_steps", "guidance_scale"))
    values: dict[str, Any] = {
        "num_inference_steps": steps.default if steps else 50,
        "guidance_scale": float(guidance.default) if guidance and guidance.default is not None else 1.0,
    }
    path = folder / "tandem.json"
    if path.is_file():
        said = read_json(path)
        for name, value in said.items():
            values[name] = _checked(path, name, value)
    return Defaults(**values)


def _checked(path: Path, name: str, value: Any) -> Any:
    """A value of `tandem.json`. Raises DiTError."""
    if name in ("num_inference_steps", "width", "height", "max_sequence_length"):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        wanted = "a whole number above 0"
    elif name == "guidance_scale":
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
        wanted = "a number of at least 0"
    elif name == "sizes":
        try:
            return tuple((_checked(path, "width", width), _checked(path, "height", height)) for width, height in value)
        except (TypeError, ValueError):
            wanted = "a list of [width, height]"
    else:
        raise DiTError(
            f"{path} has the key {name!r}; known are num_inference_steps, guidance_scale, width, height, sizes and "
            f"max_sequence_length"
        )
    raise DiTError(f"{path} gives {name} as {value!r}; it must be {wanted}")
