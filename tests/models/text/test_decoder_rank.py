"""Ranks that share a native decoder compute the logits of one rank, and each reads its own part of the weights only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_logits import logits_of, rank_logits
from ranks import run_ranks
from tiny import tiny_folder

from models.parallel import Place
from models.registry import ModelError, load_text_model

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "llama with biases, uneven vocabulary and features": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "intermediate_size": 101, "vocab_size": 271},
    ),
    "llama tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 271}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral with a window": ("mistral", {"sliding_window": 12}),
    "qwen3 with windows from a layer on": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""float32, logits of size one; sums over at most 101 terms in another order, a few of them through two layers."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        tiny_folder(tmp_path_factory.mktemp("models") / str(index), family, **overrides)
        for index, (family, overrides) in enumerate(FAMILIES.values())
    ]


@pytest.mark.parametrize(("tensor_size", "num_stages"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_compute_the_logits_of_one(folders: list[Path], tensor_size: int, num_stages: int) -> None:
    """Random weights too, where rows and columns are cut: they are those of one rank. Stages alone change no bit."""
    models: list[tuple[Path, dict[str, Any]]] = [(folder, {}) for folder in folders]
    models.append((folders[1], {"load_format": "dummy"}))
    results = run_ranks(tensor_size * num_stages, rank_logits, tensor_size, num_stages, models)
    for name, (folder, options), *of_ranks in zip([*FAMILIES, "dummy"], models, *results, strict=True):
        expected = logits_of(folder, **options)
        first, *others = of_ranks[-tensor_size:]
        assert all(torch.equal(first, other) for other in others), name
        torch.testing.assert_close(first, expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(first.argmax(-1), expected.argmax(-1)), name
        assert tensor_size > 1 or torch.equal(first, expected), name


@pytest.mark.parametrize(("tensor_size", "num_stages"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_read_each_byte_once_but_for_what_all_need(tmp_path: Path, tensor_size: int, num_stages: int) -> None:
    folder = tiny_folder(tmp_path, "llama", num_key_value_heads=4)
    stored = load_text_model(folder, device=CPU).num_bytes_read
    grid = [(rank, stage) for stage in range(num_stages) for rank in range(tensor_size)]
    read = [
        load_text_model(folder, device=CPU, place=Place(rank, tensor_size, stage, num_stages)).num_bytes_read
        for rank, stage in grid
    ]
    norms = 4 * 64 * (2 * 2 + 1)
    assert sum(read) == stored + norms * (tensor_size - 1)
    assert max(read) < stored * (1 / len(grid) + 0.01)


def test_missing_and_misshapen_tensors_of_other_ranks_are_refused_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    for change, message in (
        ({"model.layers.1.mlp.up_proj.weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj"),
        ({"model.layers.7.x": torch.ones(1)}, r"holds model\.layers\.7\.x"),
        ({"lm_head.weight": torch.ones(3, 64)}, r"lm_head\.weight as \[3, 64\], the config asks for \[269, 64\]"),
    ):
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_text_model(folder, device=CPU, place=Place(0, 2, 0, 2))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place(0, 3), r"^tensor_parallel_size is 3, but LlamaForCausalLM has 4 query heads and 2 .* work are 1, 2, 4$"),
        (Place(0, 8), r"tensor_parallel_size is 8, .* work are 1, 2, 4$"),
        (Place(0, 1, 0, 3), r"^pipeline_parallel_size is 3, but LlamaForCausalLM has 2 layers"),
    ],
)
def test_split_that_cannot_be_is_refused_with_the_numbers(tmp_path: Path, place: Place, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_text_model(tiny_folder(tmp_path, "llama"), device=CPU, place=place)


def test_rank_has_the_heads_and_layers_of_its_place(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama", num_hidden_layers=3)
    whole = load_text_model(folder, device=CPU)
    part = load_text_model(folder, device=CPU, place=Place(3, 4, 0, 2))
    assert part.spec == whole.spec == whole.rank_spec and part.num_parameters == whole.num_parameters
    assert (part.rank_spec.num_layers, part.rank_spec.num_heads, part.rank_spec.num_kv_heads) == (2, 1, 1)
