"""What the README tells a newcomer to type is typed here, block by block, against a running server."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from models.embedded.paths import EMBEDDED
from serve.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def server():
    if not (Path(EMBEDDED["tandem-text"]) / "model.safetensors").exists():
        pytest.skip("the embedded model is not here")
    with serving("--no-ray") as running:
        yield running


def test_first_commands_are_the_two_a_newcomer_needs():
    first, *_, last = blocks("shell")
    assert first.strip() == "pip install . && tandem serve"
    assert last.strip() == 'pip install ".[dev]" && pytest'


def test_every_shell_block_is_known():
    """A new shell block needs a test that runs it."""
    assert [block.split()[0] for block in blocks("shell")] == ["pip", "curl", "curl", "pip"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_examples_answer_right(server):
    def run(command: str) -> dict[str, Any]:
        typed = ["bash", "-c", command.replace(ADDRESS, server.url)]
        answer: dict[str, Any] = json.loads(subprocess.run(typed, capture_output=True, timeout=60, check=True).stdout)
        return answer

    chat, image = (run(block) for block in blocks("shell") if block.startswith("curl"))
    assert "85" in chat["choices"][0]["message"]["content"]
    assert base64.b64decode(image["data"][0]["b64_json"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(server, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code.replace(ADDRESS, server.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(done.stdout.split()) > 5


def test_example_config_is_valid(capsys):
    main(["check", str(ROOT / "deploy" / "example.yaml")])
    assert "valid, 2 models" in capsys.readouterr().out


def test_every_path_in_the_readme_exists():
    for path in re.findall(r"`((?:serve|models|loadtest|deploy|tests)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
