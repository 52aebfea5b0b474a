"""Puts an image replica together from its options: the one place that chooses classes. All else gets them passed.

`build_engine` stops at the engine, for the offline benchmark and tests; `build_image` makes and starts a `Backend`.
Whatever a user can get wrong ends here as a `ConfigError` that says what to change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from models.dit.base import DiT
from models.dit.pipeline import StockPipeline
from models.weight_files import WeightsError
from serve.compute import choose_device, choose_dtype, keep_freed_memory, process_age_s, set_threads, settle_threads
from serve.engine.engine import Engine
from serve.engine.interface import DeviceFault, Observer, Runner
from serve.errors import ConfigError
from serve.image.backend import ImageBackend
from serve.image.forward_graph import ForwardGraphs, budget_of
from serve.image.limits import Limits
from serve.image.pace import ImagePace
from serve.image.runner import ImageRunner
from serve.image.scheduler import ImageScheduler
from serve.image.solo import SoloRunner
from serve.image.trajectory import ImageBatch, ImageOutput, Trajectory
from serve.model_folder import find_model
from serve.options import ModelOptions
from serve.ranks.group import RankGroup
from serve.ranks.launch import Launcher
from serve.request import ImageLimits, ModelCard, RankCard

log = logging.getLogger(__name__)

ImageEngine = Engine[Trajectory, ImageBatch, ImageOutput]

_DEFAULT_BATCHED_TOKENS = {"cpu": 4096, "cuda": 16384}
"""One guided image of 1024 × 1024 (8192) shares a step with another on CUDA; sixteen rows of 256 × 256 on CPU. Not
measured: the least that fills a device depends on the model's width."""


def build_image(
    options: ModelOptions,
    folder: Path | None = None,
    *,
    num_replicas_here: int = 1,
    observer: Observer | None = None,
    on_death: Callable[[BaseException], None] | None = None,
    launcher: Launcher | None = None,
) -> ImageBackend:
    """Load the model, warm up, start the engine's thread. Blocks until the model can answer.

    `folder`: where the model's files are, when that is known already. `launcher`: starts other ranks; None: as
    processes of this machine.
    """
    engine, card, is_batched, ranks = _build(
        options, folder, num_replicas_here, observer=observer, on_death=on_death, launcher=launcher
    )
    engine.start()
    return ImageBackend(engine, card, has_previews=is_batched, ranks=ranks)


def build_engine(
    options: ModelOptions,
    folder: Path | None = None,
    *,
    num_replicas_here: int = 1,
    observer: Observer | None = None,
    on_death: Callable[[BaseException], None] | None = None,
    depth: int | None = None,
) -> tuple[ImageEngine, ModelCard, bool]:
    """The same up to an engine that nobody steps yet, the card of its model, and whether images share steps.

    `depth`: steps in flight. None: 1 on CUDA, which computes while the host prepares; 0 on CPU, where it would gain
    nothing. A stock pipeline takes one image at a time, at depth 0. Other ranks end with this process.
    """
    engine, card, is_batched, _ = _build(
        options, folder, num_replicas_here, observer=observer, on_death=on_death, depth=depth
    )
    return engine, card, is_batched


def _build(
    options: ModelOptions,
    folder: Path | None,
    num_replicas_here: int,
    *,
    observer: Observer | None,
    on_death: Callable[[BaseException], None] | None,
    depth: int | None = None,
    launcher: Launcher | None = None,
) -> tuple[ImageEngine, ModelCard, bool, RankGroup | None]:
    started = time.monotonic()
    folder = folder or find_model(options, "image")[0]
    device = choose_device(options)
    threads = set_threads(options, num_replicas_here * options.num_ranks)
    keep_freed_memory()
    with ExitStack() as undo:
        model, ranks, group = _load(options, folder, device, threads, launcher)
        if group is not None:
            undo.callback(group.close)
        threads = settle_threads(options, threads, model.num_parameters)
        if group is not None:
            group.call("set_threads", threads=threads)
        engine, is_batched, limits = _engine(options, model, device, depth, observer, on_death)
        if group is not None:
            group.watch(on_death or (lambda cause: None))
        undo.pop_all()
    card = ModelCard(
        name=options.name,
        kind="image",
        source=options.model,
        device=str(device),
        dtype=str(model.spec.dtype).removeprefix("torch."),
        num_parameters=model.num_parameters,
        threads=threads,
        load_s=process_age_s(since=started),
        aliases=options.served_model_name[1:],
        created=int(time.time()),
        image=limits,
        ranks=ranks,
        slo_image_s=options.slo_image_s,
    )
    log.info(
        "model ready model=%s device=%s dtype=%s threads=%d is_batched=%s size=%dx%d steps=%d load_s=%.1f",
        *(card.name, card.device, card.dtype, threads, is_batched),
        *(limits.width, limits.height, limits.num_inference_steps, card.load_s),
    )
    return engine, card, is_batched, group


def _load(
    options: ModelOptions, folder: Path, device: torch.device, threads: int, launcher: Launcher | None
) -> tuple[DiT | StockPipeline, tuple[RankCard, ...], RankGroup | None]:
    """The model, and what each rank holds and the other ranks, if it has any."""
    # Imported here: diffusers takes seconds, and an engine over a model of another origin runs without it.
    from models.dit.checkpoint import DiTError
    from models.dit.registry import load_dit

    try:
        if options.num_ranks > 1:
            from serve.image.build_ranks import load_ranked

            ranked, ranks = load_ranked(options, folder, device, threads=threads, launcher=launcher)
            return ranked, ranks, ranked.group
        dtype = choose_dtype(options, device)
        return load_dit(folder, device=device, dtype=dtype, load_format=options.load_format), (), None
    except (DiTError, WeightsError, OSError) as error:
        raise ConfigError(f"model: {error}", param="model") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ConfigError(
            f"the weights of {options.model!r} do not fit the memory of {device}", param="model"
        ) from error


def _engine(
    options: ModelOptions,
    model: DiT | StockPipeline,
    device: torch.device,
    depth: int | None,
    observer: Observer | None,
    on_death: Callable[[BaseException], None] | None,
) -> tuple[ImageEngine, bool, ImageLimits]:
    limits = _limits(options, model)
    runner, scheduler = _assemble(options, model, limits, device)
    is_batched = isinstance(runner, ImageRunner)
    if not is_batched:
        depth = 0
    engine: ImageEngine = Engine(
        scheduler,
        runner,
        depth=int(device.type == "cuda") if depth is None else depth,
        max_waiting=options.max_num_waiting,
        step_timeout_s=options.step_timeout_s,
        canary_period_s=options.canary_period_s,
        observer=observer,
        pace=ImagePace(scheduler.num_tokens),
        on_death=on_death,
    )
    return engine, is_batched, limits


def _limits(options: ModelOptions, model: DiT | StockPipeline) -> ImageLimits:
    """What may be asked for. A stock pipeline has guidance or not; an adapter always."""
    spec = model.spec
    max_pixels = min(options.max_pixels or spec.max_pixels, spec.max_pixels)
    if max_pixels < spec.width * spec.height:
        raise ConfigError(
            f"max_pixels is {max_pixels}, less than the {spec.width}x{spec.height} that {options.model!r} makes by "
            f"default; raise it",
            param="max_pixels",
        )
    if options.max_inference_steps < spec.num_inference_steps:
        raise ConfigError(
            f"max_inference_steps is {options.max_inference_steps}, less than the {spec.num_inference_steps} that "
            f"{options.model!r} takes by default; raise it",
            param="max_inference_steps",
        )
    has_guidance = model.spec.has_guidance if isinstance(model, StockPipeline) else True
    return ImageLimits(
        width=spec.width,
        height=spec.height,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=spec.guidance_scale if has_guidance else 1.0,
        size_multiple=spec.size_multiple,
        max_pixels=max_pixels,
        max_steps=options.max_inference_steps,
        solvers=spec.solvers,
        sizes=tuple(size for size in spec.sizes if size[0] * size[1] <= max_pixels),
        max_side=0 if isinstance(model, StockPipeline) else model.spec.max_side,
        has_guidance=has_guidance,
        has_negative_prompt=model.spec.has_negative_prompt if isinstance(model, StockPipeline) else True,
    )


def _assemble(
    options: ModelOptions, model: DiT | StockPipeline, image: ImageLimits, device: torch.device
) -> tuple[Runner[ImageBatch, ImageOutput], ImageScheduler]:
    """The runner, warmed up, and the scheduler for it."""
    budget = options.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS[device.type]
    try:
        if isinstance(model, StockPipeline):
            solo = SoloRunner(model, device)
            try:
                solo.warm_up()
            except Exception as error:
                raise ConfigError(f"{options.model!r}: its pipeline does not run: {error}", param="model") from error
            limits = Limits(image, lambda prompt: None, lambda solver, num_steps: None)
            return solo, ImageScheduler(limits, _num_pixels, max_num_images=1, max_num_batched_tokens=budget)
        has_graphs = device.type == "cuda" and options.num_ranks == 1 and not options.enforce_eager
        graphs = ForwardGraphs(model, device, budget=budget_of(device)) if has_graphs else None
        runner = ImageRunner(model, device, graphs)
        runner.check_schedule(image.solvers[0], image.num_inference_steps)
        runner.warm_up()
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"{options.model!r} runs out of device memory at its default size", param="model") from error
    except (DeviceFault, ValueError) as error:
        raise ConfigError(f"{options.model!r}: {error}", param="model") from error
    scheduler = ImageScheduler(
        Limits(image, model.check_prompt, runner.check_schedule),
        model.num_tokens,
        max_num_images=options.max_num_images,
        max_num_batched_tokens=budget,
    )
    return runner, scheduler


def _num_pixels(width: int, height: int) -> int:
    """Latent tokens of a stock pipeline, which does not tell: patches of 16 × 16 pixels, as most transformers have."""
    return max(1, (width // 16) * (height // 16))
