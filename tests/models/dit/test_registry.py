"""Loading: what a folder must hold, what is refused and with which remedy, random weights, settings of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from denoise import Ask, denoise
from safetensors.torch import load_file, save_file
from tiny_pipelines import dit_pipeline, save, sd3_pipeline

from models.dit.checkpoint import DiTError
from models.dit.registry import load_dit
from serve.image.solver import make_schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    save(dit_pipeline(), root / "dit")
    save(sd3_pipeline(has_t5=False), root / "sd3")
    return root


@pytest.fixture
def dit(originals, tmp_path):
    return Path(shutil.copytree(originals / "dit", tmp_path / "dit"))


@pytest.fixture
def sd3(originals, tmp_path):
    return Path(shutil.copytree(originals / "sd3", tmp_path / "sd3"))


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one out."""
    value = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def refusal(folder: Path, **options) -> str:
    with pytest.raises(DiTError) as caught:
        load_dit(folder, device=CPU, **options)
    return str(caught.value)


def test_every_solver_a_model_names_takes_its_configuration(dit, sd3):
    for folder in (dit, sd3):
        spec = load_dit(folder, device=CPU).spec
        for name in spec.solvers:
            make_schedule(name, spec.prediction, spec.solver_config, spec.num_inference_steps, 64)


def test_a_stochastic_checkpoint_samples_with_noise_by_default(sd3):
    edit(sd3 / "scheduler" / "scheduler_config.json", stochastic_sampling=True)
    assert load_dit(sd3, device=CPU).spec.solvers[0] == "flow_match_euler_stochastic"


def test_parameters_are_those_of_all_networks(dit):
    stored = sum(tensor.numel() for file in dit.rglob("*.safetensors") for tensor in load_file(file).values())
    assert load_dit(dit, device=CPU).num_parameters == stored


def test_dummy_weights_need_no_weight_files_and_make_no_blank_picture(dit, sd3):
    for folder, prompt, solver in ((dit, "1", "ddim"), (sd3, "a cat", "flow_match_euler")):
        for file in folder.rglob("*.safetensors"):
            file.unlink()
        model = load_dit(folder, device=CPU, load_format="dummy", dtype=torch.float32)
        (image,) = denoise(model, [Ask(prompt=prompt, seed=1, steps=3, solver=solver)])
        assert image.isfinite().all() and image.std() > 0.05


def test_dummy_weights_depend_on_the_prompt(dit):
    model = load_dit(dit, device=CPU, load_format="dummy")
    first, second = denoise(model, [Ask(prompt=prompt, seed=1, steps=3, solver="ddim") for prompt in "12"])
    assert (first - second).abs().mean() > 1e-3


def test_a_folder_may_bring_its_own_defaults(sd3):
    edit(
        sd3 / "tandem.json",
        num_inference_steps=12,
        guidance_scale=3,
        width=16,
        height=24,
        sizes=[[16, 24], [32, 32]],
        max_sequence_length=1,
    )
    model = load_dit(sd3, device=CPU)
    spec = model.spec
    assert (spec.num_inference_steps, spec.guidance_scale, spec.width, spec.height) == (12, 3.0, 16, 24)
    assert spec.sizes == ((16, 24), (32, 32))
    assert model.encode(["a"])[0].tensors["text"].shape[1] == 77 + 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"steps": 3}, "key 'steps'"),
        ({"num_inference_steps": 0}, "whole number above 0"),
        ({"num_inference_steps": True}, "whole number above 0"),
        ({"guidance_scale": "high"}, "number of at least 0"),
        ({"sizes": [[32]]}, "list of \\[width, height\\]"),
        ({"sizes": [[32, 30]]}, "multiples of 4 up to 64"),
        ({"width": 68}, "multiples of 4 up to 64"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(sd3, said, words):
    edit(sd3 / "tandem.json", **said)
    with pytest.raises(DiTError, match=words):
        load_dit(sd3, device=CPU)


def test_a_class_conditional_model_takes_no_other_size(dit):
    edit(dit / "tandem.json", width=64, height=64)
    assert "other sizes than 32x32" in refusal(dit)


def test_a_folder_without_an_index_is_refused(tmp_path):
    assert "model_index.json is not there" in refusal(tmp_path)


def test_a_damaged_index_is_refused(dit):
    (dit / "model_index.json").write_text("{")
    assert "download it again" in refusal(dit)


@pytest.mark.parametrize("name", ["NoSuchPipeline", "AutoencoderKL", "os"])
def test_an_unknown_pipeline_is_refused(dit, name):
    edit(dit / "model_index.json", _class_name=name)
    assert f"{name!r}, which diffusers" in refusal(dit)


def test_a_pipeline_with_code_of_its_own_is_refused(dit):
    edit(dit / "model_index.json", _class_name=["pipeline", "Mine"])
    (dit / "pipeline.py").write_text("raise SystemExit('ran')")
    assert "diffusers classes are run only" in refusal(dit)


@pytest.mark.parametrize(
    "component",
    [
        ["builtins", "eval"],
        ["os", "system"],
        ["transformers", "AutoModel"],
        ["diffusers", "NoSuchModel"],
        ["my_code", "X"],
    ],
    ids=str,
)
def test_components_of_other_origin_are_refused(dit, component):
    (dit / "my_code.py").write_text("raise SystemExit('ran')")
    edit(dit / "model_index.json", vae=component)
    assert f"{component[0]}.{component[1]} as its vae" in refusal(dit)


def test_a_component_that_the_index_leaves_out_is_named(dit):
    edit(dit / "model_index.json", vae=None)
    assert "names no vae" in refusal(dit)


def test_a_component_whose_folder_is_missing_is_named(dit):
    shutil.rmtree(dit / "vae")
    assert "vae is not there; download the whole model" in refusal(dit)


def test_a_model_without_an_encoder_that_it_needs_is_refused(sd3):
    edit(sd3 / "model_index.json", text_encoder=[None, None])
    assert "leaves out text_encoder" in refusal(sd3)


def test_missing_weight_files_are_named_with_the_way_out(dit):
    (dit / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    message = refusal(dit)
    assert "diffusion_pytorch_model.safetensors" in message and "dummy" in message


def test_pickled_weights_are_not_opened(dit):
    weights = dit / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert "pickle" in refusal(dit)


@pytest.mark.parametrize("place", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_a_tensor_that_is_missing_is_named_and_not_made_up(sd3, place):
    file = sd3 / f"{place}.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    assert f"lacks {name}" in refusal(sd3)


@pytest.mark.parametrize("place", ["transformer/diffusion_pytorch_model", "text_encoder/model"])
def test_a_tensor_of_another_shape_is_refused(sd3, place):
    file = sd3 / f"{place}.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert str(file.parent) in refusal(sd3)


def test_a_damaged_weight_file_is_refused(dit):
    (dit / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    assert "transformer" in refusal(dit)


def test_a_scheduler_that_no_solver_computes_is_refused_with_those_that_are(dit):
    edit(dit / "scheduler" / "scheduler_config.json", _class_name="DPMSolverMultistepScheduler")
    edit(dit / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    message = refusal(dit)
    assert "DPMSolverMultistepScheduler" in message and "DDIMScheduler" in message


def test_a_pipeline_without_a_step_callback_is_refused_before_its_weights_are_read(dit):
    edit(dit / "model_index.json", _class_name="PixArtAlphaPipeline")
    message = refusal(dit)
    assert "PixArtAlphaPipeline takes no callback_on_step_end" in message and "DiTPipeline" in message


def test_videos_are_refused(dit):
    edit(dit / "model_index.json", _class_name="WanPipeline")
    assert "makes videos" in refusal(dit)
