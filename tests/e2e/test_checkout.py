"""Every process runs the files of the checkout it was started from, though another one is installed or on the path."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import httpx
import pytest
from serving import ROOT, serving
from tiny import tiny_folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy with an edit that shows: who owns the models."""
    copy = tmp_path_factory.mktemp("checkout")
    for package in ("serve", "models"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    routes = copy / "serve" / "gateway" / "routes.py"
    routes.write_text(routes.read_text().replace('"owned_by": "tandem"', '"owned_by": "an edited checkout"'))
    return copy


@pytest.mark.parametrize("way", [("--no-ray",), pytest.param((), marks=pytest.mark.ray)], ids=["local", "ray"])
def test_an_edited_checkout_runs_its_own_files_in_every_process(checkout, tmp_path, way):
    arguments = [str(tiny_folder(tmp_path)), "--threads", "1", *way]
    command = [sys.executable, "-m", "serve.cli"]
    with serving(*arguments, cwd=checkout, command=command, timeout_s=180, PYTHONPATH=str(ROOT)) as server:
        [model] = httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"]
    assert model["owned_by"] == "an edited checkout"
    packages = [found[1] for line in server.lines if (found := re.search(r"process started .*package=(\S+)", line))]
    assert len(packages) >= 3 and set(packages) == {str(checkout / "serve")}
