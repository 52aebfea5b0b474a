"""The image runner on a tiny model: who shares a step changes nothing, failures leave latents as they were."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from fake_dit import FakeDiT
from hypothesis import given, settings
from hypothesis import strategies as st
from image_engine import alone, drain, job, make_engine, pixels

from serve.engine.interface import DeviceFault
from serve.engine.stream import Stream
from serve.errors import RequestFailed
from serve.image.trajectory import Stage, Trajectory

SIZES = [(16, 16), (16, 16), (24, 16)]
CLOSE = 1.0 / 255
"""Pixels of equal latents: a forward of other rows differs in the last bits, which may round to the next byte."""


wishes = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["red", "green circle", "blue"]),
        "negative_prompt": st.just(""),
        "num_steps": st.integers(1, 8),
        "guidance_scale": st.sampled_from([1.0, 1.5, 4.0]),
        "seed": st.integers(0, 2**64 - 1),
        "num_previews": st.integers(0, 2),
        "size": st.sampled_from(SIZES),
        "solver": st.integers(0, 2),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.integers(0, 12), wishes), min_size=1, max_size=8),
    prediction=st.sampled_from(["flow", "epsilon"]),
    cap=st.sampled_from([20, 64, 1000]),
    depth=st.sampled_from([0, 1, 3]),
)
def test_a_picture_does_not_depend_on_who_joins_and_leaves(wanted, prediction, cap, depth):
    """Prompts, steps, guidance, seeds, solvers, sizes, previews and arrivals at random, against one at a time."""
    model = FakeDiT(prediction=prediction)
    engine, runner = make_engine(model, depth=depth, max_num_images=5, cap=cap)
    streams: dict[str, tuple[Stream[Trajectory], dict[str, Any]]] = {}
    step = 0
    while step <= 12 or engine.step():
        for i, (arrives, wish) in enumerate(wanted):
            if arrives == step:
                values = dict(wish)
                values["width"], values["height"] = values.pop("size")
                values["solver"] = model.spec.solvers[values["solver"] % len(model.spec.solvers)]
                streams[f"job{i}"] = (engine.submit(job(f"job{i}", **values)), values)
        if step <= 12:
            engine.step()
        step += 1
    assert not runner._tensors
    for stream, values in streams.values():
        shown, expected = pixels(stream), alone(model, **values)
        assert len(shown) == len(expected) == 1 + min(values["num_previews"], values["num_steps"] - 1)
        for picture, other in zip(shown, expected):
            assert np.abs(picture - other).max() <= CLOSE


def test_eight_requests_of_every_kind_share_forwards_at_six_rows_and_more():
    model = FakeDiT(prediction="epsilon")
    engine, _ = make_engine(model)
    model.calls.clear()
    for i in range(8):
        engine.submit(
            job(
                f"{i}", num_steps=10 + 2 * i, guidance_scale=(1.0, 3.0)[i % 2],
                solver=model.spec.solvers[i % 3], seed=i, num_previews=i % 3,
            )
        )  # fmt: skip
    drain(engine)
    mean = sum(model.calls) / len(model.calls)
    print(f"\nrows per forward: {mean:.2f} in {len(model.calls)} forwards")
    assert mean >= 6


def test_a_preview_is_the_finished_image_as_that_step_sees_it():
    """With a solver that follows a straight line, by hand: x0 = x - sigma v, before the step."""
    model = FakeDiT()
    engine, runner = make_engine(model)
    stream = engine.submit(job("a", num_steps=4, num_previews=1, guidance_scale=1.0, prompt="red"))
    drain(engine)
    preview, _ = pixels(stream)
    schedule = runner._schedule("flow_match_euler", 4, 16)
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    (red,) = model.encode(["red"])
    for step in schedule.steps[:2]:
        velocity = model.predict(latent, torch.tensor([step.time]), [red])
        estimate = latent - step.time / 1000 * velocity
        latent = latent + step.output * velocity
    expected = model.decode(estimate)[0].permute(1, 2, 0).numpy()
    assert np.abs(preview - expected).max() <= CLOSE / 2 + 1e-5


def test_a_prompt_is_encoded_once_for_all_who_ask_for_it():
    model = FakeDiT()
    engine, _ = make_engine(model)
    model.encoded.clear()
    for i in range(4):
        engine.submit(job(f"{i}", prompt="the same", seed=i))
    drain(engine)
    engine.submit(job("later", prompt="the same", negative_prompt="other"))
    drain(engine)
    assert model.encoded == [["the same", ""], ["other"]]


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("kind", ["poison", "nan"])
def test_a_poisoned_prompt_fails_alone(depth, kind):
    logging.disable(logging.CRITICAL)
    model = FakeDiT()
    expected = [alone(model, prompt=prompt, num_steps=6) for prompt in ("red", "green")]
    engine, runner = make_engine(model, depth=depth)
    first = engine.submit(job("first", prompt="red", num_steps=6))
    for _ in range(3):
        engine.step()
    culprit = engine.submit(job("culprit", prompt=f"{kind}!", num_steps=6))
    second = engine.submit(job("second", prompt="green", num_steps=6))
    drain(engine)
    engine.check_health()
    logging.disable(logging.NOTSET)
    with pytest.raises(RequestFailed):
        culprit.take() and culprit.take()
    for stream, (picture,) in zip((first, second), expected):
        assert np.abs(pixels(stream)[0] - picture).max() <= CLOSE
    assert not runner._tensors


@pytest.mark.parametrize("depth", [0, 1])
def test_a_cancelled_image_costs_at_most_one_more_step_and_its_tensors(depth):
    model = FakeDiT()
    engine, runner = make_engine(model, depth=depth)
    stream = engine.submit(job("a", num_steps=40))
    for _ in range(5):
        engine.step()
    num_forwards = len(model.calls)
    stream.cancel()
    drain(engine)
    assert len(model.calls) <= num_forwards + 1
    assert not runner._tensors


def test_a_forward_that_fails_changes_no_latent():
    logging.disable(logging.CRITICAL)
    model = FakeDiT()
    expected = alone(model, prompt="red", num_steps=6)
    engine, _ = make_engine(model)
    streams = [engine.submit(job(f"{i}", prompt="red", num_steps=6)) for i in range(3)]
    predict, calls = model.predict, iter(range(1000))

    def stumble(*arguments: Any) -> torch.Tensor:
        if next(calls) in (2, 9):
            raise RuntimeError("out of memory, say")
        return predict(*arguments)

    model.predict = stumble  # type: ignore[method-assign]
    drain(engine)
    logging.disable(logging.NOTSET)
    for stream in streams:
        if stream.finish_reason == "stop":
            assert np.abs(pixels(stream)[0] - expected[0]).max() <= CLOSE
    assert [stream.finish_reason for stream in streams].count("stop") >= 2


def test_the_canary_notices_a_model_that_computes_something_else():
    model = FakeDiT()
    _, runner = make_engine(model)
    runner.check()
    model._out += 1.0
    with pytest.raises(DeviceFault, match="not what it was at the start"):
        runner.check()


def test_stages_are_batched_separately():
    model = FakeDiT()
    engine, _ = make_engine(model)
    for seen in (model.encoded, model.decoded, model.calls):
        seen.clear()
    for i in range(3):
        engine.submit(job(f"{i}", prompt=f"{i}", negative_prompt="ugly", num_steps=4))
    drain(engine)
    assert model.encoded == [["0", "1", "2", "ugly"]]
    assert [len(latents) for latents in model.decoded] == [3]
    assert model.calls == [6] * 4
    assert Stage.ENCODE < Stage.DECODE < Stage.DENOISE
