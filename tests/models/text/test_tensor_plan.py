"""Ranks that share a transformers model by its own plan compute what one rank does; what has no plan stays whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_logits import logits_of, rank_logits
from ranks import run_ranks
from tiny import tiny_config, tiny_folder
from transformers import AutoModelForCausalLM

from models.parallel import Place
from models.registry import ModelError, load_text_model
from models.text.base import DecoderSpec
from models.text.tensor_plan import apply_plan

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gpt_neox": {},
    "olmo2": {"vocab_size": 271, "intermediate_size": 101},
    "phi": {},
    "phi3": {},
    "stablelm": {},
}
"""By rows and columns; heads interleaved in one matrix; gathered for a norm over all heads; with biases; one matrix for
queries, keys and values; without a plan."""
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
"""float32, logits of size one; sums of two or four parts in another order than of one."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("num_ranks", "families"), [(2, tuple(MODELS)), (4, ("gemma2", "olmo2"))])
def test_ranks_compute_the_logits_of_one(tmp_path: Path, num_ranks: int, families: tuple[str, ...]) -> None:
    models: list[tuple[Path, dict[str, Any]]] = [
        (tiny_folder(tmp_path, family, **MODELS[family]), {}) for family in families
    ]
    models.append((models[0][0], {"load_format": "dummy"}))
    results = run_ranks(num_ranks, rank_logits, num_ranks, 1, models)
    for name, (folder, options), first, *others in zip([*families, "dummy"], models, *results, strict=True):
        expected = logits_of(folder, **options)
        assert all(torch.equal(first, other) for other in others), name
        torch.testing.assert_close(first, expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(first.argmax(-1), expected.argmax(-1)), name


def test_rank_keeps_its_part_of_the_weights() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("gemma2", tie_word_embeddings=False))
    whole = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    apply_plan(model, spec(), Place(0, 2))
    kept = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert kept == pytest.approx(whole / 2, rel=0.01)


def test_way_of_cutting_that_is_not_known_is_refused_by_module() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("gemma2"))
    model._tp_plan["model.layers.*.mlp.up_proj"] = "by_moonlight"
    with pytest.raises(ModelError, match=r"cuts model\.layers\.0\.mlp\.up_proj \(Linear\) by 'by_moonlight'"):
        apply_plan(model, spec(), Place(0, 2))


def test_stages_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^pipeline_parallel_size is 2, but the layers of Gemma2ForCausalLM"):
        load_text_model(tiny_folder(tmp_path, "gemma2"), device=CPU, place=Place(num_stages=2))


def test_number_of_ranks_that_does_not_share_the_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^tensor_parallel_size is 3, but Gemma2ForCausalLM has 4 query heads"):
        load_text_model(tiny_folder(tmp_path, "gemma2"), device=CPU, place=Place(0, 3))


def test_model_without_a_plan_is_whole_on_every_rank_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_folder(tmp_path, "stablelm")
    with caplog.at_level(logging.WARNING):
        models = [load_text_model(folder, device=CPU, place=Place(rank, 2)) for rank in range(2)]
    assert [model.rank_spec for model in models] == [models[0].spec] * 2
    assert [record.getMessage() for record in caplog.records if record.name.startswith("models")] == [
        "StableLmForCausalLM has no plan for tensor_parallel_size 2: every rank holds and computes all of it"
    ]


def spec() -> DecoderSpec:
    return DecoderSpec("Gemma2ForCausalLM", 2, 64, 4, 2, 16, 269, 512, (), torch.float32)
