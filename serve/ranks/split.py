"""Whether a model can be split as asked, told from its own description before anything loads.

Arithmetic without torch, so that `tandem check` and `tandem serve` refuse at once what would else fail after minutes
of loading. What the machine has (devices, memory) is told by who asks. Messages name option, value and the sizes that
would work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.options import ModelOptions
from serve.ranks.image_geometry import ImageGeometry, read_image
from serve.ranks.text_geometry import GeometryError, TextGeometry, read_text

Geometry = TextGeometry | ImageGeometry

_LATENT_FACTOR = 8
"""Pixels per latent element, each way, where the VAE does not say."""


def read_geometry(
    folder: Path, kind: str, *, dtype: str = "auto", on_cuda: bool = False, quantization: str | None = None
) -> Geometry:
    """The geometry of the model in `folder`. Raises GeometryError for what is not among the known shapes."""
    if kind == "text":
        config = _read_json(folder / "config.json")
        return read_text(config, dtype=dtype, on_cuda=on_cuda, quantization=quantization)
    vae = folder / "vae" / "config.json"
    channels = _read_json(vae).get("block_out_channels") if vae.is_file() else None
    factor = 2 ** (len(channels) - 1) if isinstance(channels, list) and channels else _LATENT_FACTOR
    config = _read_json(folder / "transformer" / "config.json")
    return read_image(config, dtype=dtype, on_cuda=on_cuda, latent_factor=factor)


def check_split(options: ModelOptions, geometry: Geometry) -> None:
    """Raise ValueError, its first word the option, when the model cannot be cut into that many parts."""
    if isinstance(geometry, ImageGeometry):
        if geometry.architecture not in PARTED and options.num_ranks > 1:
            raise ValueError(
                f"{_asked(options, geometry)}, but {geometry.architecture} of {options.model!r} is computed on one "
                f"device so far; those that several share are {', '.join(PARTED)}"
            )
        _check_heads(options, geometry)
        return
    size, num_stages = options.tensor_parallel_size, options.pipeline_parallel_size
    if size not in tensor_sizes(geometry):
        sizes = ", ".join(map(str, tensor_sizes(geometry)))
        raise ValueError(
            f"tensor_parallel_size is {size}, but {geometry.architecture} of {options.model!r} has "
            f"{geometry.num_heads} attention heads and {geometry.num_kv_heads} key/value heads; sizes that share them "
            f"equally are {sizes}"
        )
    if num_stages > geometry.num_layers:
        raise ValueError(
            f"pipeline_parallel_size is {num_stages}, but {geometry.architecture} of {options.model!r} has "
            f"{geometry.num_layers} layers; give a value from 1 to {geometry.num_layers}"
        )


def check_memory(options: ModelOptions, geometry: Geometry, device_bytes: int) -> None:
    """Raise ValueError when the weights of the fullest rank are more than a device of `device_bytes` may hold."""
    wanted = weight_bytes(options, geometry)
    share = options.gpu_memory_utilization
    if max(wanted) <= device_bytes * share:
        return
    fitting = [f"{flags} ({_gib(most)})" for flags, most in _smaller_splits(options, geometry)
               if most <= device_bytes * share]  # fmt: skip
    remedy = f"splits that fit are {', '.join(fitting[:4])}" if fitting else "no split of this model fits such devices"
    raise ValueError(
        f"{_asked(options, geometry)}: the weights of {options.model!r} then take {_gib(max(wanted))} on a "
        f"device, of whose {_gib(device_bytes)} {share:g} may be used; {remedy}"
    )


def weight_bytes(options: ModelOptions, geometry: Geometry) -> list[int]:
    """Of every rank, in the order of ranks. Of an image model the transformer only."""
    if isinstance(geometry, TextGeometry):
        return geometry.weight_bytes(options.pipeline_parallel_size, options.tensor_parallel_size)
    return [geometry.weight_bytes(options.tensor_parallel_size)] * options.num_ranks


def tensor_sizes(geometry: Geometry) -> list[int]:
    """Values of tensor_parallel_size that share the heads equally; key/value heads may be repeated."""
    heads = geometry.num_heads
    kv_heads = geometry.num_kv_heads if isinstance(geometry, TextGeometry) else heads
    return [size for size in _divisors(heads) if kv_heads % size == 0 or size % kv_heads == 0]


def ulysses_degrees(geometry: ImageGeometry, tensor_size: int) -> list[int]:
    """Values of ulysses_degree beside that tensor_parallel_size: they share the heads that it leaves a rank."""
    return _divisors(geometry.num_heads // tensor_size)


SIZES = {
    "text": ("tensor_parallel_size", "pipeline_parallel_size"),
    "image": ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree"),
}
"""Options that split a model of that kind."""
PARTED = ("DiTTransformer2DModel", "SD3Transformer2DModel")
"""Transformers that several ranks compute."""


def _asked(options: ModelOptions, geometry: Geometry) -> str:
    """The first option that splits, and its value."""
    name = next((name for name in SIZES[geometry.kind] if getattr(options, name) > 1), "tensor_parallel_size")
    return f"{name} is {getattr(options, name)}"


def _check_heads(options: ModelOptions, geometry: ImageGeometry) -> None:
    size, degree = options.tensor_parallel_size, options.ulysses_degree
    who = f"{geometry.architecture} of {options.model!r}"
    if size not in tensor_sizes(geometry):
        raise ValueError(
            f"tensor_parallel_size is {size}, but {who} has {geometry.num_heads} attention heads; sizes that share "
            f"them equally are {', '.join(map(str, tensor_sizes(geometry)))}"
        )
    if degree not in ulysses_degrees(geometry, size):
        raise ValueError(
            f"ulysses_degree is {degree}, but {who} has {geometry.num_heads // size} attention heads"
            + (f" a rank at tensor_parallel_size {size}" if size > 1 else "")
            + f"; degrees that share them equally are {', '.join(map(str, ulysses_degrees(geometry, size)))}"
        )


def _smaller_splits(options: ModelOptions, geometry: Geometry) -> Iterator[tuple[str, int]]:
    """Splits into more parts than asked for, the fewest first: as options, with the bytes of the fullest rank."""
    if isinstance(geometry, ImageGeometry):
        for size in tensor_sizes(geometry):
            if size > options.tensor_parallel_size:
                yield f"tensor_parallel_size {size}", geometry.weight_bytes(size)
        return
    grid = [(size, num) for size in tensor_sizes(geometry) for num in range(1, geometry.num_layers + 1)]
    for size, num in sorted(grid, key=lambda pair: (pair[0] * pair[1], pair[1])):
        if size * num > options.num_ranks:
            text = f"tensor_parallel_size {size}" + (f" with pipeline_parallel_size {num}" if num > 1 else "")
            yield text, max(geometry.weight_bytes(num, size))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GeometryError(f"{path} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise GeometryError(f"{path} holds no JSON object")
    return value
