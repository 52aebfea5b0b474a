"""`tandem plan` reckons every split of a model from its own config, and says which to take and what to type."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, running

from loadtest.rank_costs import FLUX_1, TEXT_MODELS, tables
from serve.cli import _parser, main
from serve.errors import ConfigError
from serve.options import ModelOptions
from serve.plan import PlanRequest, plan, recommend
from serve.ranks.cost import (
    LINKS,
    image_tensor_traffic,
    pipeline_traffic,
    row_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from serve.ranks.estimate import Fleet, image_estimates, text_estimates
from serve.ranks.image_geometry import read_image
from serve.ranks.text_geometry import read_text

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA_8B, LLAMA_70B = (read_text(config) for config in TEXT_MODELS.values())
FLUX = read_image(FLUX_1, on_cuda=True)


def fleet(devices: int = 8, link: str = "nvlink", memory_gb: float = 80, **others) -> Fleet:
    return Fleet(num_devices=devices, device_bytes=0.9e9 * memory_gb, link=LINKS[link], **others)


def folder(path: Path, config: dict, *, kind: str = "text") -> str:
    place = path if kind == "text" else path / "transformer"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    if kind == "image":
        (path / "model_index.json").write_text("{}")
    return str(path)


def test_shapes_are_the_models_own():
    assert (LLAMA_8B.num_parameters, LLAMA_70B.num_parameters) == (8_030_261_248, 70_553_706_496)
    assert LLAMA_70B.kv_bytes_per_token() == 327_680
    assert FLUX.num_parameters == 11_901_408_320


def test_tensor_parallel_sends_two_sums_a_layer_and_the_logits():
    traffic = tensor_traffic(LLAMA_70B, 8, num_tokens=1, num_rows=1)
    assert traffic.num_collectives == 2 * 80 + 2
    assert traffic.bytes_sent == (2 * 80 + 1) * 2 * 7 / 8 * 8192 * 2 + 7 / 8 * 128256 * 2
    assert tensor_traffic(LLAMA_70B, 1, num_tokens=1, num_rows=1).seconds(LINKS["pcie"]) == 0


def test_a_pipeline_sends_its_activations_between_stages():
    assert pipeline_traffic(LLAMA_8B, 4, num_tokens=32).bytes_sent == 3 * 32 * 4096 * 2


def test_flux_sums_and_exchanges_what_its_blocks_need():
    width = 4608 * 3072 * 2
    sums = image_tensor_traffic(FLUX, 2, image_tokens=4096)
    assert (sums.num_collectives, sums.bytes_sent) == (19 * 4 + 38, 76 * width)
    exchanged = ulysses_traffic(FLUX, 2, image_tokens=4096)
    assert exchanged.num_collectives == 2 * 57 + 1
    assert exchanged.bytes_sent == 57 * 4 * width / 2 / 2 + 4 * 4096 * 64 / 2
    assert row_traffic(FLUX, 2, image_tokens=4096).bytes_sent == 4 * 4096 * 64


def test_a_model_that_fits_one_device_is_not_split():
    estimates = [each for each in text_estimates(LLAMA_8B, fleet()) if each.fits]
    assert recommend(estimates).sizes == (1, 1) and recommend(estimates).num_replicas == 8


def test_a_large_model_gets_shards_over_nvlink_and_stages_over_pcie():
    best = {link: recommend([e for e in text_estimates(LLAMA_70B, fleet(link=link)) if e.fits]) for link in LINKS}
    assert best["nvlink"].sizes == (4, 1)
    assert best["pcie"].sizes[1] > 1


def test_what_does_not_fit_has_no_rate():
    one, two = text_estimates(LLAMA_70B, fleet(2))[:2]
    assert not one.fits and one.per_s == 0 and one.room_bytes < 0
    assert two.weight_bytes < one.weight_bytes


def test_kv_capacity_is_that_of_the_fullest_rank():
    fitting = {e.sizes: e for e in text_estimates(LLAMA_8B, fleet())}
    whole, halves = fitting[1, 1], fitting[2, 1]
    assert whole.kv_tokens == int(whole.room_bytes / 131_072)
    assert halves.kv_tokens == int(halves.room_bytes / 65_536)


def test_a_sequence_of_the_length_asked_for_must_fit():
    tight = fleet(1, memory_gb=24)
    estimate = text_estimates(LLAMA_8B, tight)[0]
    assert estimate.fits
    too_long = fleet(1, memory_gb=24, max_model_len=estimate.kv_tokens + 1)
    assert not text_estimates(LLAMA_8B, too_long)[0].fits


def test_guidance_rows_are_the_cheapest_way_to_a_faster_image():
    sd3 = read_image(
        {
            "_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24,
            "attention_head_dim": 64, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "in_channels": 16, "sample_size": 128, "patch_size": 2,
        },
        on_cuda=True,
    )  # fmt: skip
    estimates = image_estimates(sd3, fleet(2, "pcie"), driver_bytes=0)
    assert min(estimates, key=lambda estimate: estimate.single_s).sizes == (1, 2, 1)


def test_the_plan_gives_table_reason_and_command(tmp_path):
    told = plan(PlanRequest(model=folder(tmp_path / "m", TEXT_MODELS["Llama-3.1-70B"]), devices=8, memory_gb=80))
    assert "80 layers, 64 heads, 8 of keys and values, 70.55 B parameters" in told
    assert re.search(r"^ *4 +1 +2 +35\.3 GB ", told, re.M)
    assert "recommended: TP 4, 2 replicas: one device does not hold it (141.1 GB of weights)" in told
    assert "--tensor-parallel-size 4 --num-replicas 2" in told
    assert "fastest for one sequence alone: TP 8" in told
    assert "NVIDIA/nccl-tests issue 212" in told


def test_the_command_is_one_that_serve_takes(tmp_path):
    model = folder(tmp_path / "m", TEXT_MODELS["Llama-3.1-70B"])
    told = plan(PlanRequest(model=model, devices=8, memory_gb=80, max_model_len=8192, max_num_seqs=64))
    command = next(line.split() for line in told.splitlines() if line.startswith("  tandem serve"))
    arguments = vars(_parser().parse_args(command[1:]))
    known = {name: value for name, value in arguments.items() if name in ModelOptions.__dataclass_fields__}
    options = ModelOptions(model=model, **known)
    assert options.num_ranks * options.num_replicas == 8
    assert (options.max_model_len, options.max_num_seqs) == (8192, 64)


def test_a_split_that_is_not_served_yet_says_so(tmp_path):
    model = folder(tmp_path / "m", FLUX_1, kind="image")
    told = plan(PlanRequest(model=model, devices=4, memory_gb=24, link="pcie"))
    assert "not yet served so: several ranks compute DiTTransformer2DModel, SD3Transformer2DModel" in told


@pytest.mark.parametrize("model", ["tandem-text", "tandem-image"])
def test_the_models_that_ship_can_be_planned(model, capsys):
    main(["plan", model, "--devices", "2", "--memory", "1"])
    assert f"tandem serve {model}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "flags", "told"),
    [
        ({}, {"devices": 1}, r"no split of .* fits 1 devices of 80 GB: .* holds 141\.1 GB .* give more --devices"),
        ({}, {"devices": 0}, "--devices is 0; give a value from 1"),
        ({}, {"max_model_len": 1 << 20}, "--max-model-len is 1048576, .* 131072 positions"),
        ({"architectures": ["MixtralForCausalLM"]}, {}, "cannot be planned: 'MixtralForCausalLM' is not among"),
        ({"quantization_config": {}}, {}, "quantization_config"),
        ({"num_attention_heads": "64"}, {}, "num_attention_heads is '64'"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(tmp_path, changes, flags, told):
    model = folder(tmp_path / "m", TEXT_MODELS["Llama-3.1-70B"] | changes)
    with pytest.raises(ConfigError, match=told):
        plan(PlanRequest(**{"model": model, "devices": 8, "memory_gb": 80, **flags}))


def test_a_hub_id_is_planned_without_its_weights(tmp_path):
    """In a process of its own: the hub's client reads its environment when it is imported."""
    config = json.dumps(TEXT_MODELS["Llama-3.1-8B"]).encode()
    with running(FakeHub({"org/llama": {"config.json": config, "model.safetensors": b"no weights"}})) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "serve.cli", "plan", "org/llama", "--devices", "2", "--memory", "24"],
            env={"PATH": "", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "tandem serve org/llama" in done.stdout, done.stderr
    assert hub.requested == ["config.json"]


def test_the_pages_tables_are_the_codes():
    page = (ROOT / "loadtest" / "results" / "ranks.md").read_text(encoding="utf-8")
    for table in tables().split("\n\n"):
        assert table in page, "run python -m loadtest.rank_costs and put its tables into the page"
    for link in LINKS.values():
        assert f"| {link.name} | {link.bytes_per_s / 1e9:.0f} GB/s | {link.latency_s * 1e6:.0f} us |" in page
