"""The files of `deploy/ray`: valid for Ray and for us, and made for devices that hold their models. No cluster."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from loadtest.rank_costs import TEXT_MODELS
from serve.config import parse_config
from serve.deployments.app import build
from serve.deployments.ranks import bundles, by_node
from serve.options import ModelOptions, check_kind
from serve.ranks.split import check_memory, check_split
from serve.ranks.text_geometry import read_text

FILES = sorted((Path(__file__).resolve().parent.parent.parent / "deploy").glob("ray*/**/*.yaml"))
FILES += sorted((Path(__file__).resolve().parent.parent.parent / "deploy").glob("ray*.yaml"))
NODE_GPUS, GPU_BYTES = 8, 80 * 10**9
LLAMA = TEXT_MODELS["Llama-3.1-70B"]
SHAPES = {
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA,
    "meta-llama/Llama-3.1-405B-Instruct": LLAMA
    | {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "intermediate_size": 53248},
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 40960,
        "dtype": "bfloat16",
    },
}  # fmt: skip
"""From the models' own config.json."""


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def models(path: Path) -> list[ModelOptions]:
    (application,) = read(path)["applications"]
    return list(parse_config(application["args"], origin=path.name).models)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_takes_the_file_and_we_its_args(path):
    schema = ServeDeploySchema.model_validate(read(path))
    (application,) = schema.applications
    assert application.import_path == "serve.deployments.app:build"
    assert build(application.args) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_options_fit_the_kind_and_the_model_the_devices(path):
    for model in models(path):
        check_kind(model, "image" if "diffusion" in model.model or "image" in model.model else "text")
        if model.model not in SHAPES:
            assert model.num_ranks == 1, f"add the shape of {model.model}"
            continue
        geometry = read_text(SHAPES[model.model])
        check_split(model, geometry)
        check_memory(model, geometry, GPU_BYTES * model.gpu_memory_utilization)
        least = geometry.kv_bytes_per_token(0, model.pipeline_parallel_size, model.tensor_parallel_size)
        room = GPU_BYTES * model.gpu_memory_utilization - max(
            geometry.weight_bytes(model.pipeline_parallel_size, model.tensor_parallel_size)
        )
        assert room > 4 * least * model.max_model_len, "four of the longest sequences"


def test_replicas_that_share_a_gpu_share_its_memory_too():
    shared = {path.name: [model for model in models(path) if 0 < model.gpus_per_rank < 1] for path in FILES}
    assert {name for name, found in shared.items() if found} == {"one-gpu.yaml"}
    for found in shared.values():
        assert sum(model.gpus_per_rank for model in found) <= 1
        for model in found:
            assert model.gpu_memory_utilization <= model.gpus_per_rank or "diffusion" in model.model


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "cpu", "num_gpus": 1.0}, "device is 'cpu'"),
        ({"num_gpus": 0.5, "tensor_parallel_size": 2}, "2 ranks"),
    ],
)
def test_a_share_of_a_gpu_that_cannot_be_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        ModelOptions(model="any", **options)


def test_reservations_are_a_gpu_a_rank_on_the_nodes_asked_for():
    tensor, both = (
        next(path for path in FILES if path.name == name) for name in ("text-tp8.yaml", "text-tp8-pp2.yaml")
    )
    assert sum(bundle["GPU"] for bundle in bundles(models(tensor)[0])) == NODE_GPUS
    assert sum(bundle["GPU"] for bundle in bundles(models(both)[0])) == 2 * NODE_GPUS
    mixed = models(next(path for path in FILES if path.name == "mixed-16.yaml"))
    assert sum(model.num_replicas for model in mixed) == 16
    assert bundles(mixed[0])[0] == {"CPU": 0.25, "GPU": 1.0, "accelerator_type:H100": 0.001}


def test_each_stage_shares_a_node_wherever_ray_puts_the_bundles():
    for on_first in itertools.combinations(range(1, 8), 3):
        nodes = {bundle: "a" if bundle == 0 or bundle in on_first else "b" for bundle in range(8)}
        order = by_node(nodes)
        assert order[0] == 0 and sorted(order) == list(range(8))
        driver_rank = 4  # of four ranks a stage and two stages
        node_of = {(driver_rank + i) % 8: nodes[bundle] for i, bundle in enumerate(order)}
        assert [node_of[rank] for rank in range(8)] == ["b"] * 4 + ["a"] * 4
