"""Equal for replicas that compute the same, different as soon as weights or config differ."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.fingerprint import NEUTRAL, WHOLE_BYTES, fingerprint
from serve.options import ModelOptions


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with weights small and large."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"num_hidden_layers": 2}')
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (600, 300), "layer.0": (300, 300), "layer.1": (300, 300)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path / "m.safetensors")
    assert (path / "m.safetensors").stat().st_size > WHOLE_BYTES
    (path / "extra.bin").write_bytes(bytes(range(256)) * (WHOLE_BYTES // 128))
    return path


def mark(folder: Path, **options) -> str:
    return fingerprint(ModelOptions(model=str(folder), **options), folder)


def test_copies_elsewhere_have_the_same_and_caches_beside_the_files_do_not_count(folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").write_text("x")
    assert mark(copy) == mark(folder)


@pytest.mark.parametrize("name", ["embedding", "layer.0", "layer.1"])
def test_training_of_any_one_tensor_shows(folder, name):
    before, file = mark(folder), folder / "m.safetensors"
    weights = load_file(file)
    weights[name] *= 1.001
    save_file(weights, file)
    assert mark(folder) != before


def test_config_other_files_and_options_show(folder):
    marks = {mark(folder), mark(folder, dtype="bfloat16"), mark(folder, max_model_len=77)}
    (folder / "extra.bin").write_bytes(bytes(WHOLE_BYTES * 2))
    marks.add(mark(folder))
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    assert len({*marks, mark(folder)}) == 5


def test_what_only_places_or_bounds_does_not_show(folder):
    assert mark(folder, num_replicas=3, max_num_waiting=1, threads=1, served_model_name=("x",)) == mark(folder)
    assert {field.name for field in dataclasses.fields(ModelOptions)} >= NEUTRAL


def test_weights_that_are_none_are_left_to_who_loads_them(folder):
    (folder / "m.safetensors").write_bytes(b"\x10" + bytes(7) + b"{" * (2 * WHOLE_BYTES))
    assert len(mark(folder)) == 32
