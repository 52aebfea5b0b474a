"""Writes `deploy/locks/`: every package of the images, by version and the SHA-256 of the one wheel that is installed.

    python -m deploy.lock --torch-cpu https://download.pytorch.org/whl/cpu/torch/

pip resolves `pyproject.toml` without installing anything, twice: with torch from PyPI (`cuda.txt`), and with its CPU
build (`torch-cpu.txt` and `cpu.txt`, which are installed from an index each). Run it with the Python of the images, on
Linux x86-64, and with a recent pip: what pip answers is for the interpreter it runs in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy" / "locks"
PYPI = "https://pypi.org/simple"
PYTHON = "3.11"
"""Of Debian 12, the base of the images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch-cpu", required=True, metavar="PAGE", help="page or folder with torch's CPU wheels")
    arguments = parser.parse_args()
    here = f"{sysconfig.get_python_version()} {sysconfig.get_platform()}"
    if here != f"{PYTHON} linux-x86_64":
        raise SystemExit(f"lock: this is Python {here}, the images have {PYTHON} linux-x86_64; use that one")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    cuda = resolve([*wanted, *extras["otel"]])
    torch = next(item for item in cuda if item["metadata"]["name"] == "torch")["metadata"]["version"]
    cpu = resolve(
        [*wanted, *extras["otel"], *extras["cpu"], f"torch=={torch}+cpu"], "--find-links", arguments.torch_cpu
    )
    write("cuda.txt", cuda)
    write("torch-cpu.txt", [item for item in cpu if item["metadata"]["name"] == "torch"])
    write("cpu.txt", [item for item in cpu if item["metadata"]["name"] != "torch"])
    write("build.txt", resolve(project["build-system"]["requires"]))


def resolve(wanted: list[str], *options: str) -> list[dict[str, Any]]:
    """What pip would install for these requirements, as its report has it, whatever pip is set to on this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "wanted.txt").write_text("\n".join(str(Requirement(line)) for line in wanted))
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary", ":all:", "--index-url", PYPI, *options]
        command += ["--report", str(report), "-r", f"{folder}/wanted.txt"]
        subprocess.run(command, check=True, env={**environment, "PIP_CONFIG_FILE": os.devnull})
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def write(name: str, items: list[dict[str, Any]]) -> None:
    """One line a package, in the order of names."""
    lines = ["# Written by `python -m deploy.lock`; change pyproject.toml and run it again."]
    for item in sorted(items, key=lambda item: canonicalize_name(item["metadata"]["name"])):
        metadata, digest = item["metadata"], item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{canonicalize_name(metadata['name'])}=={metadata['version']} --hash=sha256:{digest}")
    (LOCKS / name).write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(items)} packages")


if __name__ == "__main__":
    main()
