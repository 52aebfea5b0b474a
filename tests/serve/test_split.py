"""A split is reckoned as the engines make it, and an impossible one is refused before anything loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from quantized_folders import compressed, group_of
from tiny import FAMILIES, tiny_config

from models.parallel import Place
from models.quantize import Quantization
from models.registry import NATIVE
from models.text.decoder import Decoder
from models.text.decoder_rank import DecoderRank
from serve.cli import main
from serve.errors import ConfigError
from serve.machine import check_devices, check_room
from serve.model_folder import find_model
from serve.options import ModelOptions, ServeOptions
from serve.preflight import settle
from serve.ranks.image_geometry import read_image
from serve.ranks.split import check_memory, check_split, read_geometry, tensor_sizes, ulysses_degrees
from serve.ranks.text_geometry import GeometryError, read_text

ROOT = Path(__file__).resolve().parent.parent.parent
META = torch.device("meta")
ARCHITECTURES = dict(zip(("llama", "mistral", "qwen2", "qwen3"), NATIVE, strict=True))


def config_of(family: str, **overrides) -> dict:
    return {**tiny_config(family, **overrides).to_dict(), "architectures": [ARCHITECTURES[family]]}


def described(path: Path, **values) -> str:
    """A folder of a Llama that has no weights, four heads of which two hold keys and values."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_of("llama", **values)))
    return str(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_stages", "size"), [(1, 1), (2, 1), (1, 2), (1, 4), (3, 2)])
def test_weight_bytes_are_those_of_each_rank(family, num_stages, size):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    config = config_of(family, num_hidden_layers=4, intermediate_size=98, vocab_size=277, **biases)
    architecture = NATIVE[config["architectures"][0]](config)
    reckoned = read_text(config).weight_bytes(num_stages, size)
    for rank, num_bytes in enumerate(reckoned):
        place = Place(rank % size, size, rank // size, num_stages)
        parts = {"dtype": torch.float32, "device": META, "num_positions": 1}
        model = Decoder(architecture, **parts) if place.is_alone else DecoderRank(architecture, place, **parts)
        assert num_bytes == sum(parameter.nbytes for parameter in model.parameters().values()), rank


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(("num_stages", "size"), [(1, 1), (2, 2)])
def test_weight_bytes_of_quantised_matrices_are_those_of_each_rank(quantization, num_stages, size):
    """Groups are as large as a row's features allow."""
    shape = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4}
    config = config_of("qwen3", **shape)
    reckoned = read_text(config, on_cuda=True, dtype="bfloat16", quantization=quantization)
    scheme = Quantization.of(config, quantization)
    architecture = NATIVE[config["architectures"][0]](config)
    for rank, num_bytes in enumerate(reckoned.weight_bytes(num_stages, size)):
        place = Place(rank % size, size, rank // size, num_stages)
        parts = {"dtype": torch.bfloat16, "device": META, "num_positions": 1, "quantization": scheme}
        model = Decoder(architecture, **parts) if place.is_alone else DecoderRank(architecture, place, **parts)
        assert num_bytes == sum(parameter.nbytes for parameter in model.parameters().values()), rank
    assert reckoned.num_parameters == read_text(config).num_parameters


def test_weight_bytes_of_a_quantised_checkpoint_are_those_of_its_own_form():
    config = config_of("qwen3", hidden_size=128, intermediate_size=256)
    stored = compressed("pack-quantized", group_of("group", bits=4, group_size=128))
    reckoned = read_text({**config, "quantization_config": stored}).weight_bytes()
    assert reckoned == read_text(config, quantization="int4").weight_bytes()
    stored["ignore"].append("re:.*layers.0.*")
    with pytest.raises(GeometryError, match="in different forms"):
        read_text({**config, "quantization_config": stored})


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_repeat_heads_that_are_too_few(family):
    geometry = read_text(config_of(family, num_hidden_layers=4))
    whole = geometry.kv_bytes_per_token()
    assert whole == 2 * 4 * geometry.num_kv_heads * geometry.head_dim * 4
    assert geometry.kv_bytes_per_token(0, 2, 2) == whole // 4
    each_has_one = geometry.kv_bytes_per_token(0, 1, geometry.num_kv_heads)
    assert geometry.kv_bytes_per_token(0, 1, geometry.num_heads) == each_has_one


SD3 = {
    "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
    "joint_attention_dim": 64, "pooled_projection_dim": 48, "pos_embed_max_size": 16, "sample_size": 16,
    "in_channels": 4, "out_channels": 4,
}  # fmt: skip
TRANSFORMERS = {
    "dit": (
        DiTTransformer2DModel,
        {
            "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
            "sample_size": 16, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
    ),
    "sd3": (SD3Transformer2DModel, SD3),
    "sd3.5": (SD3Transformer2DModel, {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}),
    "flux": (
        FluxTransformer2DModel,
        {
            "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 24, "pooled_projection_dim": 40, "guidance_embeds": True, "in_channels": 8,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parameters_are_those_that_diffusers_makes(name):
    transformer_class, config = TRANSFORMERS[name]
    with META:
        transformer = transformer_class(**config)
    config = {**transformer.config, "_class_name": transformer_class.__name__}
    assert read_image(config).num_parameters == sum(parameter.numel() for parameter in transformer.parameters())


@pytest.mark.parametrize("name", ["dit", "sd3", "sd3.5"])
def test_a_shard_has_what_the_shards_of_diffusers_transformers_have(name):
    from models.dit.shards import cut_layers

    transformer_class, config = TRANSFORMERS[name]
    with META:
        transformer = transformer_class(**config)
    geometry = read_image({**transformer.config, "_class_name": transformer_class.__name__})
    cut_layers(transformer, Place(0, 2))
    assert geometry.weight_bytes(2) == 4 * sum(parameter.numel() for parameter in transformer.parameters())


def test_sizes_that_work_share_all_heads_equally():
    config = config_of("llama", hidden_size=96, num_attention_heads=24, num_key_value_heads=8)
    assert tensor_sizes(read_text(config)) == [1, 2, 4, 8, 24]
    geometry = read_geometry(ROOT / "models" / "embedded" / "tandem-image", "image")
    assert tensor_sizes(geometry) == [1, 2, 4]
    assert ulysses_degrees(geometry, 2) == [1, 2]


@pytest.mark.parametrize(
    ("model", "sizes", "told"),
    [
        ("tandem-text", {"tensor_parallel_size": 4}, "tensor_parallel_size is 4, .* 6 attention heads .* are 1, 2, 6$"),
        ("tandem-text", {"tensor_parallel_size": 3}, "2 key/value heads"),
        ("tandem-text", {"pipeline_parallel_size": 7}, "pipeline_parallel_size is 7, .* 6 layers; .* from 1 to 6"),
        ("tandem-image", {"tensor_parallel_size": 3}, "tensor_parallel_size is 3, .* 4 attention heads.* 1, 2, 4$"),
        ("tandem-image", {"tensor_parallel_size": 2, "ulysses_degree": 4}, "ulysses_degree is 4, .* are 1, 2$"),
    ],
)
def test_an_impossible_split_is_refused_by_option_value_numbers_and_sizes(model, sizes, told):
    kind = model.removeprefix("tandem-")
    geometry = read_geometry(ROOT / "models" / "embedded" / model, kind)
    with pytest.raises(ValueError, match=told):
        check_split(ModelOptions(model=model, kind=kind, **sizes), geometry)


def test_flux_is_not_split_and_says_so():
    transformer_class, config = TRANSFORMERS["flux"]
    geometry = read_image({**config, "_class_name": transformer_class.__name__})
    with pytest.raises(ValueError, match="ulysses_degree is 2, but FluxTransformer2DModel of 'f' is computed on one"):
        check_split(ModelOptions(model="f", ulysses_degree=2), geometry)


def test_weights_that_no_device_holds_are_refused_with_splits_that_fit():
    geometry = read_text(config_of("llama", num_hidden_layers=8, hidden_size=512, intermediate_size=2048))
    options = ModelOptions(model="m", tensor_parallel_size=2)
    share = max(geometry.weight_bytes(1, 2)) / options.gpu_memory_utilization
    check_memory(options, geometry, int(share) + 1)
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2: .* 0\.9 may be used; splits that fit"):
        check_memory(options, geometry, int(share / 2))
    with pytest.raises(ValueError, match="no split of this model fits such devices"):
        check_memory(options, geometry, 1000)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["Mamba2ForCausalLM"]}, "Mamba2ForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_cannot_be_reckoned_is_named(changes, told):
    with pytest.raises(GeometryError, match=told):
        read_text({**config_of("llama"), **changes})


def test_every_rank_needs_a_cuda_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(ModelOptions(model="m", tensor_parallel_size=2))
    check_devices(ModelOptions(model="m", tensor_parallel_size=8, device="cpu"))
    with pytest.raises(ValueError, match=r"'m' has 4 ranks, .* this machine has 2; the most ranks that fit are 2"):
        check_devices(ModelOptions(model="m", tensor_parallel_size=4))
    with pytest.raises(ValueError, match="2 ranks in each of 2 replicas"):
        check_devices(ModelOptions(model="m", tensor_parallel_size=2, num_replicas=2))


def test_weights_beyond_this_machines_memory_are_refused(monkeypatch):
    monkeypatch.setattr("serve.machine.free_memory_bytes", lambda: 1 << 20)
    options = ModelOptions(model="tandem-text", tensor_parallel_size=2, device="cpu")
    with pytest.raises(ValueError, match="model is 'tandem-text', whose weights take"):
        check_room(options, read_geometry(ROOT / "models" / "embedded" / "tandem-text", "text"))


def test_serve_refuses_before_it_starts_anything(tmp_path):
    model = ModelOptions(model=described(tmp_path / "m"), load_format="dummy", pipeline_parallel_size=3)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 3"):
        settle(ServeOptions(models=(model,)), loads_here=True)
    settle(ServeOptions(models=(model,)), loads_here=False)  # the folder is on the cluster's nodes


def test_a_replica_refuses_when_it_has_the_files(tmp_path):
    model = ModelOptions(model=described(tmp_path / "m"), load_format="dummy", tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3"):
        find_model(model)


def test_check_refuses_an_impossible_split_in_a_file(tmp_path, capsys):
    file = tmp_path / "tandem.yaml"
    file.write_text("models:\n  - {model: tandem-text, tensor_parallel_size: 5}\n")
    with pytest.raises(SystemExit, match="tensor_parallel_size is 5"):
        main(["check", str(file)])


def test_arithmetic_needs_no_torch():
    code = "import sys, serve.ranks.split, serve.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
