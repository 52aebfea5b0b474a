"""Weights arrive whole and in place, however they are cut into files; what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paged import PagedModel
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from models import weights
from models.registry import ModelError, load_text_model
from models.weight_files import WeightsError, weight_files
from models.weights import Cut, fill_dummy, load_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def logits(folder: Path, **options: object) -> torch.Tensor:
    return PagedModel(load_text_model(folder, device=CPU, **options)).step({"a": [1, 2, 3, 4, 5]})["a"]  # type: ignore[arg-type]


def test_sharded_equals_single(tmp_path: Path) -> None:
    sharded = tiny_folder(tmp_path / "sharded", max_shard_size="60KB")
    assert len(weight_files(sharded)) > 2
    assert torch.equal(logits(sharded), logits(tiny_folder(tmp_path / "single")))


def test_weights_are_converted_to_the_wanted_dtype(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, dtype=torch.bfloat16)
    stored = load_text_model(folder, device=CPU)
    wanted = load_text_model(folder, device=CPU, dtype=torch.float32)
    assert (stored.spec.dtype, wanted.spec.dtype) == (torch.bfloat16, torch.float32)
    # bfloat16 keeps eight bits; two layers of sums over 96 terms leave some 2 % of logits of size one.
    torch.testing.assert_close(
        PagedModel(stored).step({"a": [5]}), PagedModel(wanted).step({"a": [5]}), atol=8e-2, rtol=0
    )


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = tiny_folder(tmp_path, max_shard_size="60KB")
    load_text_model(folder, device=CPU, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (seen[0][1], seen[0][1])


def test_dummy_weights_need_no_files_and_are_the_same_each_time(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    first = logits(folder, load_format="dummy")
    assert first.isfinite().all()
    assert torch.equal(first, logits(folder, load_format="dummy"))


@pytest.mark.parametrize(
    ("cut", "shape"), [(Cut(0, 3), (9, 20)), (Cut(0, 10), (10, 20)), (Cut(1, 7), (30, 6)), (Cut(1, 0), (30, 20))]
)
def test_dummy_weights_of_a_part_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, cut: Cut, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(weights, "_DUMMY_ELEMENTS", 100)
    whole, part = torch.empty(30, 20), torch.empty(shape)
    fill_dummy({"a.weight": whole})
    fill_dummy({"a.weight": part}, cuts={"a.weight": cut}, whole={"a.weight": whole.shape})
    assert torch.equal(part, whole[cut.index(part)])
    assert 0.015 < float(whole.std()) < 0.025 and whole.unique().numel() == whole.numel()


def test_copy_of_tied_embeddings_and_derived_tensors_are_ignored(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    expected = logits(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, file)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj"),
        (lambda tensors: tensors.update({"model.layers.7.x": torch.ones(1)}), r"holds model\.layers\.7\.x"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"as \[3\], the config asks for \[64\]"),
    ],
)
def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path, change: object, message: str) -> None:
    folder = tiny_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_text_model(folder, device=CPU)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    file = tiny_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_text_model(file.parent, device=CPU)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json is no index of weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("../../etc/passwd", "only files beside"), ("absent.safetensors", "not there")]
)
def test_index_reaches_only_files_beside_it(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightsError, match=message):
        load_weights(tmp_path, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"architectures": None}, "architectures in config.json is None"),
    ],
)
def test_config_that_cannot_be_computed_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = tiny_folder(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        load_text_model(folder, device=CPU)


def test_ends_of_turn_come_from_both_configs(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [266, 268]}')
    assert load_text_model(folder, device=CPU).spec.eos_token_ids == (268, 266)
