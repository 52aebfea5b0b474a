"""How `tandem serve` starts, or does not: hub ids, broken models, signals while it loads. What fails leaves nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import psutil
import pytest
from fake_hub import FakeHub, running
from serving import eventually, launched, serving
from tiny import tiny_folder

ARGUMENTS = ("--no-ray", "--threads", "1")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_folder(tmp_path)


def test_a_hub_id_is_fetched_and_served(folder, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with running(FakeHub({"org/model": {**files, "pytorch_model.bin": b"code"}})) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        with serving("org/model", *ARGUMENTS, **environment) as server:
            [model] = httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"]
            assert model["id"] == "org/model"
            answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "the", "max_tokens": 2}, timeout=30)
            assert answer.status_code == 200
        assert "model.safetensors" in hub.requested and "pytorch_model.bin" not in hub.requested
        with launched("org/absent", *ARGUMENTS, **environment) as server:
            assert server.process.wait(timeout=60) == 1
            eventually(
                lambda: "'org/absent' is not" in server.lines[-1] and "the hub does not have it" in server.lines[-1]
            )


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"", "cannot be read as safetensors"),
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("chat_template.jinja", b"{% if %}", "the chat template is not valid jinja2"),
        ("model_index.json", b"{}", "names the pipeline None; diffusers classes are run only"),
    ],
)
def test_a_broken_model_ends_the_start_in_one_line_and_leaves_no_process(folder, file, content, words):
    (folder / file).write_bytes(content)
    with launched(str(folder), *ARGUMENTS) as server:
        started = eventually(lambda: psutil.Process(server.process.pid).children(), within_s=60)
        assert server.process.wait(timeout=60) == 1
        eventually(lambda: server.lines[-1].startswith("tandem: ") and words in server.lines[-1])
        assert not any("Traceback" in line for line in server.lines)
        eventually(lambda: not any(is_alive(process) for process in started))


@pytest.mark.parametrize("way", [(), ("--no-ray",)], ids=["ray", "no-ray"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "others can reach --host '0.0.0.0', and there is no API key; give --api-key"),
        (("/absent/model",), "model: '/absent/model' is not a folder on this machine, and not a hub id"),
        (("--api-key-file", "/absent/keys"), "--api-key-file '/absent/keys' cannot be read: No such file"),
        (("--api-key", "caf\u00e9"), "an API key is empty or holds other than printable ASCII"),
    ],
)
def test_keys_exposure_and_paths_are_refused_before_anything_starts(way, flags, words):
    with launched(*way, *flags) as server:
        assert server.process.wait(timeout=60) == 1
        eventually(lambda: server.lines[-1].startswith("tandem: ") and words in server.lines[-1])
        assert sum("process started" in line for line in server.lines) <= 1  # the command itself


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_the_start_with_zero(folder, number):
    with launched(str(folder), *ARGUMENTS) as server:
        started = eventually(lambda: psutil.Process(server.process.pid).children(), within_s=60)
        server.process.send_signal(number)
        assert server.process.wait(timeout=30) == 0
        assert not any("Traceback" in line for line in server.lines)
        eventually(lambda: not any(is_alive(process) for process in started))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
