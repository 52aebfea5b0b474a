"""Rotary frequencies equal transformers' for every scaling, in both spellings of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged import PagedModel
from tiny import tiny_folder, tiny_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.registry import load_text_model
from models.text.rope import RopeSpec, RopeTable, interleave, rotate_

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "longrope": {
        "short_factor": [1.0 + index / 9 for index in range(16)],
        "long_factor": [3.0 + index for index in range(16)],
        "original_max_position_embeddings": 64,
    },
}


def config_of(kind: str, theta: float = 50_000.0) -> LlamaConfig:
    parameters = {"rope_type": kind, "rope_theta": theta, **SCALINGS[kind]}
    return LlamaConfig(head_dim=32, max_position_embeddings=512, rope_parameters=parameters)


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_equal_transformers(kind: str) -> None:
    config = config_of(kind)
    spec = RopeSpec.read(config.to_dict(), head_dim=32)
    for length in (64, 512):
        expected, factor = ROPE_INIT_FUNCTIONS[spec.kind](config, torch.device("cpu"), seq_len=length)
        ours, our_factor = spec.frequencies(length)
        torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
        assert our_factor == pytest.approx(factor)


def test_both_spellings_of_the_config_mean_the_same() -> None:
    scaling = SCALINGS["llama3"]
    new = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    old = {"max_position_embeddings": 512, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new_frequencies, _ = RopeSpec.read(new, head_dim=32).frequencies(512)
    old_frequencies, _ = RopeSpec.read(old, head_dim=32).frequencies(512)
    assert torch.equal(new_frequencies, old_frequencies)


def test_yarn_serves_the_stretched_length() -> None:
    config = {"max_position_embeddings": 128, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert RopeSpec.read(config, head_dim=32).longest == 512


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral"}, "'spiral'"),
        ({"rope_type": "linear"}, "needs 'factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "needs 'long_factor'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unknown_or_incomplete_scaling_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeSpec.read({"max_position_embeddings": 64, "rope_parameters": parameters}, head_dim=32)


def test_rotation_is_transformers_with_pairs_side_by_side() -> None:
    spec = RopeSpec.read({"max_position_embeddings": 64}, head_dim=16)
    table = RopeTable(spec, num_positions=64, device=torch.device("cpu"))
    x_TNH = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 30, 63])
    angles = torch.cat([positions[:, None] * spec.frequencies(64)[0]] * 2, -1).unsqueeze(1)
    half = torch.cat((-x_TNH[..., 8:], x_TNH[..., :8]), -1)
    expected = x_TNH * angles.cos() + half * angles.sin()

    def paired(heads: torch.Tensor) -> torch.Tensor:
        return torch.stack([interleave(token.flatten(), 16).view(3, 16) for token in heads])

    rotated = paired(x_TNH)
    rotate_(rotated, table.at(positions))
    torch.testing.assert_close(rotated, paired(expected), atol=1e-6, rtol=1e-5)


def test_rotation_keeps_length_and_depends_on_the_distance_only() -> None:
    spec = RopeSpec.read({"max_position_embeddings": 64}, head_dim=16)
    table = RopeTable(spec, num_positions=64, device=torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        x = x.clone()
        rotate_(x, table.at(torch.tensor([position])))
        return x

    def score(query_at: int, key_at: int) -> torch.Tensor:
        return (rotated(query, query_at) * rotated(key, key_at)).sum()

    torch.testing.assert_close(score(9, 4), score(60, 55), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated(query, 33).norm(), query.norm())


@pytest.mark.parametrize("kind", SCALINGS)
def test_logits_with_a_scaling_equal_transformers(tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(1)
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]}
    ids = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = tiny_model("llama", head_dim=32, rope_parameters=parameters)(torch.tensor([ids])).logits[0]
    folder = tiny_folder(tmp_path, "llama", head_dim=32, rope_parameters=parameters)
    model = load_text_model(folder, device=torch.device("cpu"))
    torch.testing.assert_close(PagedModel(model).step({"a": ids})["a"], expected, atol=2e-5, rtol=1e-5)
