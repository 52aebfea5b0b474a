"""From options to an image replica: what is chosen, and what a user is told when it cannot be."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_pipelines import dit_pipeline, flux_pipeline, save, sd3_pipeline

from serve.errors import ConfigError, InvalidRequest
from serve.events import Event, Finished, ImagePreview, ImageReady
from serve.image.build import build_engine, build_image
from serve.image.runner import ImageRunner
from serve.image.solo import SoloRunner
from serve.options import ModelOptions, check_kind
from serve.request import ImageRequest

KINDS = {"class-conditional": dit_pipeline, "text to image": sd3_pipeline, "stock": flux_pipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: save(make(), tmp_path_factory.mktemp("models") / "it") for name, make in KINDS.items()}
    index = {"width": 32, "height": 32}
    (made["stock"] / "tandem.json").write_text(json.dumps(index))
    return made


def options(model: Any = "m", **values: Any) -> ModelOptions:
    return ModelOptions(model=str(model), **{"threads": 1, **values})


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_tells_what_was_built_and_the_backend_answers(folders, kind):
    async def test() -> None:
        backend = await asyncio.to_thread(build_image, options(folders[kind], served_model_name=("mine", "other")))
        card = backend.card
        limits = card.image
        assert limits is not None
        assert (card.name, card.aliases, card.kind, card.dtype) == ("mine", ("other",), "image", "float32")
        assert (limits.width, limits.height) == (32, 32) and card.threads == 1 and card.num_parameters > 1000
        request = ImageRequest(
            request_id="r", model="mine", prompt="7", width=32, height=32, num_inference_steps=4,
            guidance_scale=limits.guidance_scale, solver=limits.solvers[0], seed=1, num_previews=1, n=2,
        )  # fmt: skip
        events: list[Event] = [event async for some in await backend.submit(request) for event in some]
        files = [event.data for event in events if isinstance(event, ImageReady)]
        assert [Image.open(io.BytesIO(file)).size for file in files] == [(32, 32)] * 2
        assert sum(isinstance(event, ImagePreview) for event in events) == (0 if kind == "stock" else 2)
        finished = [event for event in events if isinstance(event, Finished)]
        assert len(finished) == 2 and finished[0].usage.completion_tokens > 0
        await backend.aclose()

    run(test)


def test_families_share_steps_and_other_pipelines_run_alone(folders):
    engine, _, is_batched = build_engine(options(folders["text to image"], max_num_images=7))
    assert is_batched and isinstance(engine._runner, ImageRunner) and engine.scheduler.max_num_images == 7  # type: ignore[attr-defined]
    engine, _, is_batched = build_engine(options(folders["stock"]), depth=1)
    assert not is_batched and isinstance(engine._runner, SoloRunner) and engine.scheduler.max_num_images == 1  # type: ignore[attr-defined]
    assert engine._depth == 0


def test_an_unknown_class_is_refused_with_the_nearest_names(folders):
    async def test() -> None:
        backend = await asyncio.to_thread(build_image, options(folders["class-conditional"]))
        request = ImageRequest(
            request_id="r", model="it", prompt="goldfisch", width=32, height=32, num_inference_steps=2,
            guidance_scale=1.0, solver="ddim", seed=1,
        )  # fmt: skip
        with pytest.raises(InvalidRequest, match="goldfish") as refusal:
            await backend.submit(request)
        assert refusal.value.param == "prompt"
        await backend.aclose()

    run(test)


def test_limits_may_be_lowered_but_not_below_the_models_defaults(folders):
    folder = folders["text to image"]
    _, card, _ = build_engine(options(folder, max_pixels=32 * 32, max_inference_steps=28))
    assert card.image is not None and (card.image.max_pixels, card.image.max_steps) == (1024, 28)
    with pytest.raises(ConfigError, match="max_pixels is 100, less than the 32x32"):
        build_engine(options(folder, max_pixels=100))
    with pytest.raises(ConfigError, match="max_inference_steps is 5, less than the 28"):
        build_engine(options(folder, max_inference_steps=5))


def test_random_weights_need_no_weights(folders, tmp_path):
    for path in folders["text to image"].rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = tmp_path / path.relative_to(folders["text to image"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    _, card, _ = build_engine(options(tmp_path, load_format="dummy"))
    assert card.num_parameters > 1000
    with pytest.raises(ConfigError, match="model: "):
        build_engine(options(tmp_path))


def test_weights_that_compute_nan_are_refused_at_the_start(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in folders["class-conditional"].rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(folders["class-conditional"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out_2.weight"].fill_(float("nan"))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="not finite"):
        build_engine(options(tmp_path))


@pytest.mark.parametrize("model", ["text", "missing"])
def test_what_is_no_image_model_is_a_config_error(tmp_path, model):
    if model == "text":
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model_index\.json|is no image model"):
        build_engine(options(tmp_path, load_format="dummy"))


def test_options_of_the_other_kind_are_named():
    check_kind(options(max_num_images=3, max_num_batched_tokens=4096), "image")
    check_kind(options(max_model_len=512), "text")
    for name, value in {
        "max_model_len": 512, "max_num_seqs": 8, "block_size": 32, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 1 << 20, "chat_template": "x",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is an option of text models"):
            check_kind(options(**{name: value}), "image")
    with pytest.raises(ValueError, match="max_pixels is an option of image models"):
        check_kind(options(max_pixels=64), "text")


@pytest.mark.parametrize(
    ("kind", "sizes", "refusal", "param"),
    [
        ("stock", {"cfg_parallel_size": 2}, r"cfg_parallel_size is 2, but FluxPipeline", "cfg_parallel_size"),
        ("text to image", {"tensor_parallel_size": 3}, "tensor_parallel_size is 3, .* 1, 2, 4", "tensor_parallel_size"),
        ("class-conditional", {"ulysses_degree": 4}, "ulysses_degree is 4, .* 2 attention heads", "ulysses_degree"),
    ],
)
def test_ranks_that_cannot_share_a_model_are_refused_before_any_starts(
    folders, monkeypatch, kind, sizes, refusal, param
):
    monkeypatch.setattr("serve.ranks.group.RankGroup.start", None)
    for folder in (folders[kind], None):  # found already, or to be found
        with pytest.raises(ConfigError, match=refusal) as told:
            build_engine(options(folders[kind], **sizes), folder)
        assert told.value.param == param
        refusal = sizes_only(refusal)


def sizes_only(refusal: str) -> str:
    """Who looks for a model refuses in other words."""
    return refusal.split(",")[0]
