"""A model is found where it was named, or the message says where it was looked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, running
from huggingface_hub import constants
from tiny import tiny_folder

from models import source
from models.source import SourceError, kind_of, resolve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tiny_folder(tmp_path / "origin")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extras = {"modeling_evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "original/params.json": b"{}"}
    repos = {
        "org/tiny": {**files, **extras},
        "org/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"},
        "org/gated": files,
    }
    with running(FakeHub(repos, gated=frozenset({"org/gated"}))) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def test_folder_is_itself(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    assert resolve(str(folder)) == folder


def test_embedded_name_is_a_folder_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "EMBEDDED", tmp_path)
    tiny_folder(tmp_path).rename(tmp_path / "tandem-text")
    assert resolve("tandem-text") == tmp_path / "tandem-text"


def test_hub_id_is_downloaded_without_code_or_pickles(hub: FakeHub) -> None:
    folder = resolve("org/tiny")
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").read_bytes() == hub.repos["org/tiny"]["model.safetensors"]
    assert not {"modeling_evil.py", "pytorch_model.bin", "original/params.json"} & set(hub.requested)


def test_dummy_weights_are_not_downloaded(hub: FakeHub) -> None:
    folder = resolve("org/tiny", load_format="dummy")
    assert (folder / "config.json").is_file()
    assert "model.safetensors" not in hub.requested


def test_second_start_works_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/tiny") == first


def test_environment_of_huggingface_hub_is_honoured(hub: FakeHub, tmp_path: Path) -> None:
    code = "from models.source import resolve; print(resolve('org/tiny'))"
    root = Path(source.__file__).parents[1]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/absent", "not a folder here, and the hub does not have it"),
        ("org/gated", "accepted its licence"),
        ("org/pickled", "neither model.safetensors"),
        ("./absent", "'./absent' is not a folder on this machine"),
        ("/some/where/deep", "check the path"),
    ],
)
def test_absent_model_says_where_it_was_looked_for(hub: FakeHub, model: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve(model)


INDEX = {
    "_class_name": "X",
    "transformer": ["diffusers", "T"],
    "text_encoder": ["transformers", "E"],
    "tokenizer": ["transformers", "K"],
    "scheduler": ["diffusers", "S"],
    "image_encoder": [None, None],
}
PIPELINE = {
    "model_index.json": json.dumps(INDEX).encode(),
    "transformer/config.json": b"1",
    "transformer/diffusion_pytorch_model.safetensors": b"2",
    "text_encoder/config.json": b"3",
    "text_encoder/model.safetensors": b"4",
    "tokenizer/vocab.json": b"5",
    "tokenizer/merges.txt": b"6",
    "tokenizer/spiece.model": b"7",
    "scheduler/scheduler_config.json": b"8",
}
"""All contents differ: the hub's cache fetches equal ones once."""


def test_of_an_image_model_each_file_is_fetched_once_and_in_one_form(hub: FakeHub) -> None:
    copies = {
        "whole.safetensors": b"everything again",
        "transformer/diffusion_pytorch_model.fp16.safetensors": b"again",
        "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": b"again",
        "transformer/diffusion_pytorch_model.bin": b"pickle",
        "text_encoder/modeling_evil.py": b"raise SystemExit",
        "picture.png": b"",
    }
    hub.repos["org/pictures"] = {**PIPELINE, **copies}
    folder = resolve("org/pictures")
    assert sorted(hub.requested) == sorted(PIPELINE)
    assert all((folder / name).is_file() for name in PIPELINE)


@pytest.mark.parametrize("lost", [name for name in PIPELINE if name.endswith(".safetensors")])
def test_weights_missing_from_a_component_are_named(tmp_path: Path, lost: str) -> None:
    for name, content in PIPELINE.items():
        if name != lost:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{(tmp_path / lost).parent} holds neither {Path(lost).name}"):
        resolve(str(tmp_path))
    assert resolve(str(tmp_path), load_format="dummy") == tmp_path


def test_an_index_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(SourceError, match="download it again"):
        resolve(str(tmp_path))


def test_image_models_ship_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "EMBEDDED", tmp_path)
    for name, content in PIPELINE.items():
        (tmp_path / "tandem-image" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tandem-image" / name).write_bytes(content)
    assert source.embedded_names() == ["tandem-image"]
    assert kind_of(resolve("tandem-image")) == "image"


def test_unknown_revision_is_named(hub: FakeHub) -> None:
    with pytest.raises(SourceError, match="no revision 'v9'"):
        resolve("org/tiny", "v9")


def test_offline_without_the_model_in_the_cache_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        resolve("org/other")


def test_folder_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="convert them to safetensors"):
        resolve(str(folder))
    assert resolve(str(folder), load_format="dummy") == folder


def test_file_and_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="is a file"):
        resolve(str(tmp_path / "weights.gguf"))
    with pytest.raises(SourceError, match=r"neither config\.json"):
        resolve(str(tmp_path))


def test_kind_follows_the_describing_file(tmp_path: Path) -> None:
    assert kind_of(tiny_folder(tmp_path)) == "text"
    (tmp_path / "model_index.json").write_text("{}")
    assert kind_of(tmp_path) == "image"
