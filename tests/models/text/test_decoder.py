"""The native decoder computes what transformers computes, however a prompt is cut, batched or shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged import PagedModel
from tiny import FAMILIES, tiny_folder, tiny_model

from models.registry import load_text_model
from models.text.decoder import Decoder

CPU = torch.device("cpu")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
"""float32, logits of size one, sums over at most 96 terms: 1e-6 each, a few of them through two layers."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "mistral with a window": ("mistral", {"sliding_window": 12}),
    "qwen2 with mixed windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3 with windows from a layer on": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "multi-query": ("qwen3", {"num_key_value_heads": 1}),
    "no grouping": ("llama", {"num_key_value_heads": 4}),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return VARIANTS[request.param]


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_prefill_in_one_piece_equals_transformers(tmp_path: Path, variant: tuple[str, dict[str, Any]]) -> None:
    ids = prompt(50)
    model = load(tmp_path, variant)
    torch.testing.assert_close(PagedModel(model).step({"a": ids})["a"], oracle(variant, ids), **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "cpu"])
def test_prefill_in_chunks_then_decode_equals_transformers(
    tmp_path: Path, variant: tuple[str, dict[str, Any]], attention: str
) -> None:
    ids = prompt(50)
    paged = PagedModel(load(tmp_path, variant), attention)
    parts = [paged.step({"a": ids[start:stop]})["a"] for start, stop in ((0, 7), (7, 8), (8, 31), (31, 40))]
    parts += [paged.step({"a": [token]})["a"] for token in ids[40:]]
    torch.testing.assert_close(torch.cat(parts), oracle(variant, ids), **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "cpu"])
def test_batch_of_chunks_and_decodes_equals_transformers(
    tmp_path: Path, variant: tuple[str, dict[str, Any]], attention: str
) -> None:
    prompts = {f"s{index}": prompt(20 + 5 * index, index) for index in range(4)}
    paged = PagedModel(load(tmp_path, variant), attention)
    paged.step({"s0": prompts["s0"][:19], "s1": prompts["s1"][:24]})
    logits = paged.step(
        {"s0": prompts["s0"][19:], "s2": prompts["s2"], "s1": prompts["s1"][24:], "s3": prompts["s3"][:11]}
    )
    assert paged.num_forwards == 2
    torch.testing.assert_close(logits["s0"], oracle(variant, prompts["s0"])[19:], **TOLERANCE)
    torch.testing.assert_close(logits["s1"], oracle(variant, prompts["s1"])[24:], **TOLERANCE)
    torch.testing.assert_close(logits["s2"], oracle(variant, prompts["s2"]), **TOLERANCE)
    torch.testing.assert_close(logits["s3"], oracle(variant, prompts["s3"])[:11], **TOLERANCE)


def test_shared_prefix_blocks_give_the_logits_of_an_own_prefix(
    tmp_path: Path, variant: tuple[str, dict[str, Any]]
) -> None:
    first, rest = prompt(40), prompt(9, seed=5)
    paged = PagedModel(load(tmp_path, variant))
    paged.step({"a": first})
    paged.fork("a", "b", num_blocks=4)
    logits = paged.step({"b": rest, "a": [3]})
    torch.testing.assert_close(logits["b"], oracle(variant, first[:32] + rest)[32:], **TOLERANCE)
    torch.testing.assert_close(logits["a"], oracle(variant, [*first, 3])[40:], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_logits_are_bit_equal_alone_and_among_mates(tmp_path: Path, dtype: torch.dtype) -> None:
    """At the sizes of this model; in float32 MKL may choose another kernel for longer paddings (see cpu.py)."""
    model = load_text_model(tiny_folder(tmp_path, "qwen3", dtype=dtype), device=CPU)
    prompts = {f"s{index}": prompt(9 + 23 * index, index) for index in range(6)}

    def decode(names: list[str]) -> dict[str, torch.Tensor]:
        paged = PagedModel(model, "cpu")
        for name in names:
            paged.step({name: prompts[name]})
        return paged.step({name: [5] for name in names})

    together = decode(list(prompts))
    for names in (["s0"], ["s3"], ["s5"], ["s1", "s4"], ["s2", "s0", "s5"]):
        for name, logits in decode(names).items():
            assert torch.equal(logits, together[name]), f"{name} among {names}"


def load(tmp_path: Path, variant: tuple[str, dict[str, Any]]) -> Decoder:
    family, overrides = variant
    model = load_text_model(tiny_folder(tmp_path, family, **overrides), device=CPU)
    assert isinstance(model, Decoder)
    return model


def oracle(variant: tuple[str, dict[str, Any]], ids: list[int]) -> torch.Tensor:
    """logits of transformers for every position of one sequence."""
    family, overrides = variant
    with torch.inference_mode():
        logits: torch.Tensor = tiny_model(family, **overrides)(torch.tensor([ids])).logits[0]
    return logits
