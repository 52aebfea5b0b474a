"""The fallback: a stock pipeline step by step, equal to the last bit, ended anywhere."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import FluxPipeline, HeunDiscreteScheduler, StableDiffusionPipeline
from tiny_pipelines import flux_pipeline, save

from models.dit.pipeline import NotSteppable, PipelineRun, StockPipeline, step_parameters
from models.dit.registry import load_dit

CPU = torch.device("cpu")
SETTINGS = {"width": 32, "height": 32, "num_inference_steps": 4, "guidance_scale": 3.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(flux_pipeline(), tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture(scope="module")
def model(folder):
    model = load_dit(folder, device=CPU)
    assert isinstance(model, StockPipeline)
    return model


@pytest.fixture(scope="module")
def stock_image(folder):
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def make(prompt: str, seed: int, **settings) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(prompt, **{**SETTINGS, **settings}, generator=generator, output_type="pt").images[0]

    return make


def pipeline_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pipeline"]


def finish(run: PipelineRun) -> torch.Tensor:
    while (step := run.advance()).pixels is None:
        pass
    run.close()
    return step.pixels


def test_each_advance_is_one_denoise_step_and_the_last_brings_the_image(model, stock_image):
    run = model.start("a cat", seed=1, **SETTINGS)
    steps = [run.advance() for _ in range(4)]
    run.close()
    assert [(step.step, step.num_steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.pixels is None for step in steps] == [True, True, True, False]
    torch.testing.assert_close(steps[-1].pixels, stock_image("a cat", 1), rtol=0, atol=0)
    assert pipeline_threads() == []


def test_runs_advanced_in_turn_do_not_touch_each_other(model, stock_image):
    asks = [("a cat", 1, 4), ("a dog", 2, 7), ("a bird", 3, 2)]
    runs = [model.start(text, seed=seed, **{**SETTINGS, "num_inference_steps": n}) for text, seed, n in asks]
    images: dict[int, torch.Tensor] = {}
    while len(images) < len(runs):
        for index, run in enumerate(runs):
            if index not in images and (pixels := run.advance().pixels) is not None:
                images[index] = pixels
    for index, (text, seed, num_steps) in enumerate(asks):
        expected = stock_image(text, seed, num_inference_steps=num_steps)
        torch.testing.assert_close(images[index], expected, rtol=0, atol=0)


def test_between_steps_nothing_computes(model):
    forwards = []
    transformer = model._pipeline.transformer
    hook = transformer.register_forward_pre_hook(lambda *args: forwards.append(threading.current_thread().name))
    run = model.start("a cat", seed=1, **SETTINGS)
    try:
        for done in (1, 2):
            run.advance()
            assert forwards == ["pipeline"] * done
    finally:
        run.close()
        hook.remove()
    assert len(forwards) == 2


@pytest.mark.parametrize("num_advances", [0, 1, 3])
def test_a_run_can_be_ended_between_any_two_steps(model, stock_image, num_advances):
    run = model.start("a cat", seed=1, **SETTINGS)
    for _ in range(num_advances):
        run.advance()
    run.close(timeout_s=30)
    run.close()
    assert pipeline_threads() == []
    with pytest.raises(RuntimeError, match="ended"):
        run.advance()
    torch.testing.assert_close(
        finish(model.start("a cat", seed=1, **SETTINGS)), stock_image("a cat", 1), rtol=0, atol=0
    )


def test_a_run_closed_from_another_thread_ends_with_its_step(model):
    run = model.start("a cat", seed=1, **SETTINGS)
    run.advance()
    is_in_step, may_go = threading.Event(), threading.Event()

    def wait(*args):
        is_in_step.set()
        may_go.wait(60)

    hook = model._pipeline.transformer.register_forward_pre_hook(wait)
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            run.advance()
        except BaseException as error:
            errors.append(error)

    driver = threading.Thread(target=drive)
    driver.start()
    assert is_in_step.wait(60)
    with pytest.raises(TimeoutError, match="still in its step"):
        run.close(timeout_s=0.01)
    may_go.set()
    run.close()
    driver.join(60)
    hook.remove()
    assert [type(error) for error in errors] == [RuntimeError]
    assert not driver.is_alive() and pipeline_threads() == []


def test_what_the_pipeline_raises_is_raised_to_who_advances(model):
    def fail(*args):
        raise MemoryError("none left")

    run = model.start("a cat", seed=1, **SETTINGS)
    run.advance()
    hook = model._pipeline.transformer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError, match="none left"):
            run.advance()
    finally:
        hook.remove()
    run.close()
    with pytest.raises(RuntimeError, match="ended"):
        run.advance()
    assert pipeline_threads() == []


def test_a_scheduler_that_visits_times_twice_says_how_many_steps_there_are():
    """Heun takes 2 n - 1 forwards for n steps."""

    class Twice:
        """What a pipeline is to its driver."""

        def __init__(self) -> None:
            self.scheduler = HeunDiscreteScheduler()

        def __call__(self, *, num_inference_steps, callback_on_step_end, **_):
            self.scheduler.set_timesteps(num_inference_steps)
            for index, time in enumerate(self.scheduler.timesteps):
                callback_on_step_end(self, index, time, {})
            self.images = torch.full((1, 3, 2, 2), 2.0)
            return self

    run = PipelineRun(Twice(), {"num_inference_steps": 3})
    steps = [run.advance() for _ in range(5)]
    assert [step.num_steps for step in steps] == [5] * 5
    assert steps[-1].pixels is not None and steps[-1].pixels.max() == 1


def test_what_the_model_says_of_itself(model):
    spec = model.spec
    assert (spec.num_inference_steps, spec.guidance_scale, spec.dtype) == (28, 3.5, torch.float32)
    assert (spec.width, spec.height, spec.size_multiple) == (256, 256, 8)
    assert spec.solvers == ("FlowMatchEulerDiscreteScheduler",)
    assert spec.has_guidance and not spec.has_negative_prompt


def test_a_negative_prompt_that_would_do_nothing_is_refused_by_name(model):
    with pytest.raises(ValueError, match="FluxPipeline computes no negative_prompt; leave it out"):
        model.start("a cat", seed=1, negative_prompt="dog", **SETTINGS)


def test_a_pipeline_that_wants_more_than_a_text_is_not_steppable():
    class NeedsImage:
        def __call__(self, prompt, image, num_inference_steps, generator, output_type, callback_on_step_end=None): ...

    with pytest.raises(NotSteppable, match="NeedsImage needs image"):
        step_parameters(NeedsImage)


def test_pipelines_with_a_unet_are_steppable_too():
    assert "negative_prompt" in step_parameters(StableDiffusionPipeline)
