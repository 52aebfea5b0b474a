"""Quantised checkpoints, laid out as public ones are, compute what the float checkpoint of their numbers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged import PagedModel
from quantized_folders import FORMATS, change_config, compressed, group_of, quantized_folder
from rank_logits import logits_of, rank_logits
from ranks import run_ranks
from tiny import tiny_folder

from models.parallel import Place
from models.registry import load_text_model
from models.text.base import ModelError
from models.weight_files import WeightsError

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "head_dim": 32}
BOUNDS = {"fp8": 2e-5, "int8": 2e-3, "int4": 2e-5}
"""Of logits, as a share of their norm. fp8 and int4 are float32 products in another order; int8 takes activations to
15 bits of a row's greatest, 4e-5 of a product, which the layers then carry on."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 384 features; 64 output features of keys, half a block of 128."""
    return tiny_folder(tmp_path_factory.mktemp("source"), "qwen3", **SHAPE)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_computes_what_its_numbers_stand_for(name: str, source: Path, tmp_path: Path) -> None:
    if name == "packed int4 by row":  # torch's kernel takes rows of 256 at most: the other matrices are dequantised
        source = tiny_folder(tmp_path, "qwen3", **{**SHAPE, "intermediate_size": 512})
    quantized, dequantized = quantized_folder(source, name, tmp_path)
    kind = next(kind for kind in BOUNDS if kind in name)
    found, wanted = logits_of(quantized), logits_of(dequantized)
    assert difference(found, wanted) < BOUNDS[kind]
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert difference(found, logits_of(source)) > 1e-3, "the comparison is with something else than the original"


@pytest.mark.parametrize(("name", "share"), [("compressed int8 by row", 0.27), ("packed int4 in groups", 0.16)])
def test_a_quantised_checkpoint_takes_less_memory(name: str, share: float, source: Path, tmp_path: Path) -> None:
    """Of the matrices of the layers, against float32: a quarter or an eighth, and the scales."""
    quantized, dequantized = quantized_folder(source, name, tmp_path)
    models = [load_text_model(folder, device=CPU) for folder in (quantized, dequantized)]
    others = models[1].spec.vocab_size * SHAPE["hidden_size"] * 4
    small, large = (model.weight_bytes - others for model in models)  # type: ignore[attr-defined]
    assert small < share * large
    assert models[0].num_parameters == models[1].num_parameters


def test_matrices_that_the_checkpoint_leaves_out_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    """By name, by pattern and by transformers' list, in which a name stands for what is below it."""
    quantized, dequantized = quantized_folder(source, "compressed int8 by row", tmp_path)
    left_out = ["re:.*layers.1.*", "model.layers.0.self_attn.o_proj"]
    mixed = tmp_path / "mixed"
    _mix(quantized, source, mixed, lambda name: "layers.1." in name or "0.self_attn.o_proj" in name)
    config = compressed("int-quantized", group_of("channel"), ignore=["lm_head", *left_out])
    change_config(mixed, quantization_config=config)
    expected = tmp_path / "expected"
    _mix(dequantized, source, expected, lambda name: "layers.1." in name or "0.self_attn.o_proj" in name)
    assert difference(logits_of(mixed), logits_of(expected)) < BOUNDS["int8"]


def _mix(folder: Path, plain: Path, target: Path, is_plain: Any) -> None:
    """`target`: the tensors of `folder`, but those of `plain` where `is_plain` of the name."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items()
        if not (is_plain(name) and "_proj." in name)
    }  # fmt: skip
    tensors |= {
        name: tensor for name, tensor in load_file(plain / "model.safetensors").items()
        if is_plain(name) and "_proj." in name
    }  # fmt: skip
    save_file(tensors, target / "model.safetensors")


def test_matrices_computed_as_one_must_be_stored_alike(source: Path, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(source, "compressed int8 by row", tmp_path)
    config = compressed("int-quantized", group_of("channel"), ignore=["re:.*k_proj"])
    change_config(quantized, quantization_config=config)
    with pytest.raises(ModelError, match=r"k_proj.* in different forms"):
        load_text_model(quantized, device=CPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'; computed here are fp8 .* or the unquantised one"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'; computed here is e4m3"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128; two whole numbers"),
        (
            compressed("pack-quantized", group_of("group", bits=3, group_size=128)),
            "group_0: weights of int with 3 bits",
        ),
        (compressed("nvfp4-pack-quantized", group_of("tensor_group", kind="float", bits=4)), "'nvfp4-pack-quantized'"),
        (compressed("int-quantized", group_of("channel", symmetric=False)), "asymmetric, in the format"),
        (
            compressed("pack-quantized", group_of("group", bits=4, group_size=128, actorder="group")),
            r"order of activations \(actorder 'group'\)",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is {}"),
    ],
)
def test_a_form_that_is_not_read_is_named(config: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(source, "compressed int8 by row", tmp_path)
    change_config(quantized, quantization_config=config)
    with pytest.raises(ModelError, match=message):
        load_text_model(quantized, device=CPU)


def test_weights_of_another_form_than_the_config_says_are_refused(source: Path, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(source, "compressed int8 by row", tmp_path)
    change_config(
        quantized, quantization_config=compressed("float-quantized", group_of("channel", kind="float"), dynamic=True)
    )
    with pytest.raises(
        WeightsError, match=r"is stored as int8, where quantization_config in config\.json means float8_e4"
    ):
        load_text_model(quantized, device=CPU)


def test_groups_that_do_not_divide_a_row_are_refused(source: Path, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(source, "packed int4 in groups", tmp_path)
    change_config(
        quantized,
        quantization_config=compressed("pack-quantized", group_of("group", bits=4, group_size=96)),
    )
    with pytest.raises(ModelError, match="has 256 input features here, which groups of 96"):
        load_text_model(quantized, device=CPU)


def test_ranks_cut_scales_with_their_weights(source: Path, tmp_path: Path) -> None:
    """Rows of queries and features, columns of outputs; zero points are packed along the rows that are cut."""
    names = ["compressed int8 by row", "packed int4 with zero points", "compressed fp8 by tensor", "fp8 in blocks"]
    square = tiny_folder(tmp_path, "llama", **{**SHAPE, "num_key_value_heads": 8, "intermediate_size": 512})
    folders = [
        quantized_folder(square if "blocks" in name else source, name, tmp_path / str(index))[0]
        for index, name in enumerate(names)
    ]
    for name, folder, *of_ranks in zip(
        names, folders, *run_ranks(2, rank_logits, 2, 1, [(folder, {}) for folder in folders]), strict=True
    ):
        assert torch.equal(*of_ranks), name
        # Each of two ranks scales its own half of the activations.
        assert difference(of_ranks[0], logits_of(folder)) < BOUNDS["int8"], name


def test_a_cut_within_what_shares_a_scale_is_refused(tmp_path: Path) -> None:
    """64 output features of keys are half a block."""
    wide = tiny_folder(tmp_path, "qwen3", **{**SHAPE, "intermediate_size": 512})
    quantized, _ = quantized_folder(wide, "fp8 in blocks", tmp_path)
    with pytest.raises(ModelError, match=r"cuts model.layers.0.self_attn.k_proj .* stands for 128 of them at a time"):
        load_text_model(quantized, device=CPU, place=Place(1, 2))


def test_random_weights_take_the_form_that_the_checkpoint_has(source: Path, tmp_path: Path) -> None:
    quantized, _ = quantized_folder(source, "packed int4 in groups", tmp_path)
    (quantized / "model.safetensors").unlink()
    model = load_text_model(quantized, device=CPU, load_format="dummy")
    assert model.weight_bytes < 0.3 * model.num_parameters * 4  # type: ignore[attr-defined]
    assert PagedModel(model).step({"a": [1, 2, 3]})["a"].isfinite().all()
