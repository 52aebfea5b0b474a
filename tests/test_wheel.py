"""The wheel holds all that serving needs: built, installed on its own, serving in another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import httpx
import pytest
from serving import serving

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, sys
import serve.cli, models.embedded.paths as paths
from importlib.resources import files
page = files("serve").joinpath("playground/index.html").read_text()
print(json.dumps([serve.cli.__file__, sorted(map(str, paths.EMBEDDED.values())), "<html" in page]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    for name in names:
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    [built] = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"serve", "models", "loadtest"}
    assert "serve/playground/index.html" in names


def test_wheel_serves_from_another_folder(wheel, tmp_path):
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [site] = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    # Dependencies come from this environment; the package itself is found in its own first.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = environment / "bin" / "python"
    done = subprocess.run(
        [str(python), "-c", SCRIPT], cwd=elsewhere, capture_output=True, text=True, timeout=120, check=True
    )
    module, embedded, has_page = json.loads(done.stdout)
    assert module.startswith(str(site)) and has_page
    assert all(path.startswith(str(site)) for path in embedded)
    with serving("--no-ray", cwd=elsewhere, command=[str(python), "-m", "serve.cli"]) as server:
        models = httpx.get(f"{server.url}/v1/models", timeout=10).json()
    assert sorted(model["id"] for model in models["data"]) == ["tandem-image", "tandem-text"]
