"""`tandem plan`: which splits of a model fit some devices, what each moves and should take, and which one to choose.

The model's weights are not read: its own config is enough, of a folder, an embedded model or one on the hub. All of it
is arithmetic (`serve/ranks/estimate.py`); the bandwidths it rests on are printed with it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.source import SourceError, kind_of, resolve
from models.weight_files import WeightsError, weight_files
from serve.errors import ConfigError
from serve.ranks.cost import DEVICE_SOURCE, LINKS
from serve.ranks.estimate import STEP_TOKENS, USUAL_TOKENS, Estimate, Fleet, image_estimates, text_estimates
from serve.ranks.image_geometry import ImageGeometry
from serve.ranks.split import PARTED, SIZES, Geometry, read_geometry
from serve.ranks.text_geometry import GeometryError, TextGeometry

SHORT = {
    "tensor_parallel_size": "TP",
    "pipeline_parallel_size": "PP",
    "cfg_parallel_size": "CFG",
    "ulysses_degree": "SP",
}
MEMORY_SHARE = 0.9
"""Of a device's memory: the default of gpu_memory_utilization."""
MAX_ROWS = 12
CLOSE = 0.97
"""Of the best rate: a split of fewer ranks that comes this near is the better one, as it has less to go wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What `tandem plan` is asked. `memory_gb`: of one device, in 10^9 bytes."""

    model: str
    devices: int
    memory_gb: float
    link: str = "nvlink"
    dtype: str = "auto"
    quantization: str | None = None
    revision: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256

    def check(self) -> None:
        """Raises ConfigError naming flag, value and remedy."""
        for flag, value, least, most in (
            ("--devices", self.devices, 1, 1024),
            ("--memory", self.memory_gb, 0.001, 100_000),
            ("--max-model-len", self.max_model_len, 1, 1 << 24),
            ("--max-num-seqs", self.max_num_seqs, 1, 4096),
        ):
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{flag} is {value!r}; give a value from {least} to {most}")


def plan(request: PlanRequest) -> str:
    """The plan as text. Raises ConfigError: there is no such model, its split is not known, or nothing fits."""
    request.check()
    geometry, driver_bytes = _read(request)
    fleet = Fleet(
        num_devices=request.devices,
        device_bytes=request.memory_gb * 1e9 * MEMORY_SHARE,
        link=LINKS[request.link],
        max_model_len=request.max_model_len,
        max_num_seqs=request.max_num_seqs,
    )
    if isinstance(geometry, TextGeometry):
        if request.max_model_len is not None and request.max_model_len > geometry.max_positions:
            raise ConfigError(
                f"--max-model-len is {request.max_model_len}, but {request.model!r} was made for "
                f"{geometry.max_positions} positions; lower it"
            )
        estimates = text_estimates(geometry, fleet)
    elif request.quantization is not None:
        raise ConfigError(f"--quantization is {request.quantization!r}, but {request.model!r} is an image model")
    else:
        estimates = image_estimates(geometry, fleet, driver_bytes=driver_bytes)
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        raise ConfigError(_nothing_fits(request, geometry, estimates))
    best = recommend(fitting)
    lines = [*_heading(request, geometry, fleet, driver_bytes), "", *table(geometry, _shown(fitting, best)), ""]
    lines += _recommendation(request, geometry, estimates, best)
    fastest = min(fitting, key=lambda estimate: estimate.single_s)
    if fastest.single_s < CLOSE * best.single_s:
        what = "sequence alone" if geometry.kind == "text" else "image"
        lines += [
            f"fastest for one {what}: {_split(geometry, fastest)}, {_time(fastest.single_s)} a step where the "
            f"recommended split takes {_time(best.single_s)}",
            "  " + command(request, geometry, fastest),
            *_reservations(geometry, fastest),
        ]
    return "\n".join([*lines, "", *_assumptions(geometry, fleet)])


def recommend(fitting: Sequence[Estimate]) -> Estimate:
    """The split with the highest rate of the whole fleet; of those about as good, the one of fewest ranks."""
    most = max(estimate.per_s for estimate in fitting)
    good = [estimate for estimate in fitting if estimate.per_s >= CLOSE * most]
    return min(good, key=lambda estimate: (estimate.num_ranks, -estimate.per_s))


def table(geometry: Geometry, estimates: Sequence[Estimate]) -> list[str]:
    """One line for each split, below a heading."""
    sizes = [SHORT[name] for name in SIZES[geometry.kind]]
    if isinstance(geometry, TextGeometry):
        heads = [*sizes, "replicas", "weights/rank", "KV tokens", "running", "sent/token", "sent/step", "on links"]
        rows = [[*heads, "step", "tokens/s", "1 sequence"]]
    else:
        rows = [[*sizes, "replicas", "weights/rank", "sent/step", "on links", "step", "image steps/s"]]
    for estimate in estimates:
        row = [*map(str, estimate.sizes), str(estimate.num_replicas), _bytes(estimate.weight_bytes)]
        if isinstance(geometry, TextGeometry):
            row += [str(estimate.kv_tokens), str(estimate.num_running), _bytes(estimate.moved_once)]
        row += [_bytes(estimate.traffic.bytes_sent), _time(estimate.link_s), _time(estimate.step_s)]
        row += [f"{estimate.per_s:.0f}" if estimate.per_s >= 100 else f"{estimate.per_s:.1f}"]
        rows.append([*row, _time(estimate.single_s)] if isinstance(geometry, TextGeometry) else row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def command(request: PlanRequest, geometry: Geometry, estimate: Estimate) -> str:
    """What to type for a split."""
    words = ["tandem", "serve", request.model, "--device", "cuda"]
    for name, size in zip(SIZES[geometry.kind], estimate.sizes, strict=True):
        words += ["--" + name.replace("_", "-"), str(size)] if size > 1 else []
    words += ["--num-replicas", str(estimate.num_replicas)] if estimate.num_replicas > 1 else []
    words += ["--dtype", request.dtype] if request.dtype != "auto" else []
    words += ["--quantization", request.quantization] if request.quantization is not None else []
    words += ["--revision", request.revision] if request.revision is not None else []
    if geometry.kind == "text":
        words += ["--max-model-len", str(request.max_model_len)] if request.max_model_len is not None else []
        words += ["--max-num-seqs", str(request.max_num_seqs)] if request.max_num_seqs != 256 else []
    return shlex.join(words)


def _read(request: PlanRequest) -> tuple[Geometry, int]:
    """The model's geometry, and the bytes of what only an image model's driver holds."""
    try:
        folder = resolve(request.model, request.revision, load_format="dummy")
        kind = kind_of(folder)
        geometry = read_geometry(folder, kind, dtype=request.dtype, on_cuda=True, quantization=request.quantization)
    except SourceError as error:
        raise ConfigError(f"model: {error}", param="model") from None
    except GeometryError as error:
        raise ConfigError(f"model: {request.model!r} cannot be planned: {error}", param="model") from None
    return geometry, _component_bytes(folder) if kind == "image" else 0


def _component_bytes(folder: Path) -> int:
    """Weights of text encoders and VAE, as stored; 0 for those that are not on this machine."""
    total = 0
    for place in sorted(folder.iterdir()):
        if place.name == "transformer" or not (place / "config.json").is_file():
            continue
        stem = "model" if (place / "model.safetensors").exists() else "diffusion_pytorch_model"
        try:
            total += sum(file.stat().st_size for file in weight_files(place, stem))
        except (WeightsError, OSError):
            for index in place.glob("*.safetensors.index.json"):
                total += _stored_bytes(index)
    return total


def _stored_bytes(index: Path) -> int:
    """What an index of weights says they take."""
    try:
        return int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _heading(request: PlanRequest, geometry: Geometry, fleet: Fleet, driver_bytes: int) -> list[str]:
    count = geometry.num_parameters
    parameters = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    numbers = f"{parameters} parameters of {8 * geometry.bytes_per_weight} bits"
    where = f"{fleet.num_devices} devices of {request.memory_gb:g} GB, {fleet.link.name}"
    if isinstance(geometry, TextGeometry):
        numbers += f", matrices in {geometry.scheme.values}" if geometry.scheme is not None else ""
        heads = f"{geometry.num_heads} heads, {geometry.num_kv_heads} of keys and values"
        longest = min(fleet.max_model_len or geometry.max_positions, geometry.max_positions)
        load = f"up to {fleet.max_num_seqs} sequences of {min(longest, USUAL_TOKENS)} positions, the longest {longest}"
        return [
            f"{request.model}: {geometry.architecture}, {geometry.num_layers} layers, {heads}, {numbers}",
            f"{where}; {load}",
        ]
    side, rows = geometry.default_side, geometry.num_guided_rows
    return [
        f"{request.model}: {geometry.architecture}, {geometry.num_attentions} attentions of {geometry.num_heads} "
        f"heads, {numbers}",
        f"{where}; images of {side}x{side}, {rows} {'rows' if rows > 1 else 'row'} of "
        f"{geometry.image_tokens(side, side)} + {geometry.text_tokens} tokens; beside it the driver holds "
        + (f"{_bytes(driver_bytes)} of encoders and VAE" if driver_bytes else "encoders and VAE, not counted"),
    ]


def _shown(fitting: Sequence[Estimate], best: Estimate) -> list[Estimate]:
    """The best few, in the order they came in."""
    ranked = sorted(fitting, key=lambda estimate: -estimate.per_s)[: MAX_ROWS - 2]
    kept = {estimate.sizes for estimate in (*ranked, best, min(fitting, key=lambda estimate: estimate.single_s))}
    return [estimate for estimate in fitting if estimate.sizes in kept]


def _recommendation(
    request: PlanRequest, geometry: Geometry, estimates: Sequence[Estimate], best: Estimate
) -> list[str]:
    single, fitting = estimates[0], [estimate for estimate in estimates if estimate.fits]
    unit = "tokens a second" if geometry.kind == "text" else "steps of images a second"
    if best.num_ranks == 1:
        reason = "the model fits one device, and replicas move nothing between devices"
    elif not single.fits:
        room = f" leave room for {single.kv_tokens} tokens" if single.room_bytes > 0 else ""
        reason = f"one device does not hold it ({_bytes(single.weight_bytes)} of weights{room}); "
        reason += f"of what fits, this gives the most {unit}"
    else:
        reason = f"{best.per_s:.0f} {unit} against {single.per_s:.0f} of one device each"
        reason += ", which has less room for sequences" if geometry.kind == "text" else ""
    lines = [
        f"recommended: {_split(geometry, best)}: {reason}",
        "  " + command(request, geometry, best),
        *_reservations(geometry, best),
    ]
    if len(fitting) < len(estimates):
        too_large = [estimate for estimate in estimates if not estimate.fits]
        told = ", ".join(f"{_split(geometry, each, bare=True)} ({_bytes(each.weight_bytes)})" for each in too_large[:4])
        lines.append(f"too large for a device, with the weights of a rank: {told}{', ...' * (len(too_large) > 4)}")
    return lines


def _reservations(geometry: Geometry, estimate: Estimate) -> list[str]:
    """What stands between a split and serving it today."""
    if estimate.num_ranks > 1 and isinstance(geometry, ImageGeometry) and geometry.architecture not in PARTED:
        return [f"  not yet served so: several ranks compute {', '.join(PARTED)}, not {geometry.architecture}"]
    return []


def _nothing_fits(request: PlanRequest, geometry: Geometry, estimates: Sequence[Estimate]) -> str:
    least = max(estimates, key=lambda estimate: estimate.room_bytes)
    lacking = (
        f"lacks {_bytes(-least.room_bytes)} on its fullest rank"
        if least.room_bytes < 0
        else f"has room for {least.kv_tokens} tokens, fewer than one sequence"
    )
    return (
        f"no split of {request.model!r} fits {request.devices} devices of {request.memory_gb:g} GB: the roomiest, "
        f"{_split(geometry, least, bare=True)}, holds {_bytes(least.weight_bytes)} of weights a rank and {lacking}; "
        f"give more --devices, more --memory" + (" or a smaller --max-model-len" if geometry.kind == "text" else "")
    )


def _split(geometry: Geometry, estimate: Estimate, *, bare: bool = False) -> str:
    named = zip(SIZES[geometry.kind], estimate.sizes, strict=True)
    text = " x ".join(f"{SHORT[name]} {size}" for name, size in named if size > 1) or "one device"
    return text if bare else f"{text}, {estimate.num_replicas} replica{'s' * (estimate.num_replicas > 1)}"


def _assumptions(geometry: Geometry, fleet: Fleet) -> list[str]:
    is_text = geometry.kind == "text"
    step = "one token for every running sequence" if is_text else "one denoise step of one image"
    room = f"what the activations of a step of {STEP_TOKENS if is_text else 'one image'} "
    return [
        "reckoned, not measured:",
        f"  device   {DEVICE_SOURCE}",
        f"  link     {fleet.link.name}: {fleet.link.source}",
        f"  memory   {MEMORY_SHARE:g} of each device, less {room}{'tokens take' if is_text else 'take'}",
        f"  columns  sent: in one direction, by one rank after another; step: {step}",
        "  not in   the host's work between steps, and handing a step to the ranks: 0.03 to 0.2 ms measured on a node "
        "(loadtest/results/ranks.md)",
    ]


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
