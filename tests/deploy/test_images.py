"""The Dockerfile, its locks, the compose file: what they hold to, and that a breach of each rule is named."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `deploy` is no part of the package

from deploy.dockerfile import context_files, ignored, parse  # noqa: E402
from deploy.rules import compose_problems, dockerfile_problems  # noqa: E402

DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLOORS = {  # below these, an advisory is open
    "starlette": "1.3.1",
    "aiohttp": "3.14.2",
    "pillow": "12.3.0",
    "ray": "2.56.0",
    "torch": "2.9.1",
    "diffusers": "0.38.0",
    "transformers": "5.5.0",
}


def locked(*names: str) -> dict[str, str]:
    """Versions by package."""
    lines = [line for name in names for line in (DEPLOY / "locks" / name).read_text().splitlines()]
    found = [re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines if line[0] != "#"]
    assert all(found), "a line of a lock is no name==version --hash=sha256:..."
    return {match[1]: match[2] for match in found if match}


LOCKS = {"cpu": locked("torch-cpu.txt", "cpu.txt"), "cuda": locked("cuda.txt")}


def test_shipped_files_keep_the_rules():
    assert dockerfile_problems(TEXT) == []
    assert compose_problems(COMPOSE) == []


DIGEST = re.search(r"@sha256:[0-9a-f]{64}", TEXT)[0]
BROKEN = {
    "is not pinned": (DIGEST, ""),
    "USER is 'tandem'": ("USER 10001:10001", "USER tandem"),
    "USER is 'root'": ("USER 10001:10001\n", ""),
    "add --require-hashes": ("--require-hashes ", ""),
    "two indexes": ("--index-url", "--extra-index-url https://example.org/simple --index-url"),
    "without a version": ("tini=0.19.0-1+b3", "tini"),
    "runs what it downloads": ("RUN groupadd", "RUN wget -qO- https://example.org/setup | sh && groupadd"),
    "'gcc' is used in stage final": ("RUN groupadd", "RUN apt-get install -y gcc=4:12.2.0-3 && groupadd"),
    "copies from the context": ("FROM final AS cpu\n", "FROM final AS cpu\nCOPY serve /serve\n"),
    "signals reach a shell": ('["serve", "--host", "0.0.0.0"]', "serve --host 0.0.0.0"),
    "process 1 is not an init": ('"tini", "--", "tandem"', '"tandem"'),
    "has no HEALTHCHECK": (re.search(r"HEALTHCHECK .*\\\n.*\n", TEXT)[0], ""),
    "OCI labels revision": ("org.opencontainers.image.revision", "revision"),
    "no such stage": ("AS cuda", "AS gpu"),
    "ADD is not among": ("COPY serve serve", "ADD serve serve"),
}


@pytest.mark.parametrize("told", BROKEN)
def test_a_broken_dockerfile_is_told_its_fault(told):
    old, new = BROKEN[told]
    assert old in TEXT
    assert any(told in problem for problem in dockerfile_problems(TEXT.replace(old, new)))


BROKEN_COMPOSE = {
    "is not pinned": ("prometheus", "image", "prom/prometheus:latest"),
    "does not name the commit": ("tandem-cpu", "image", "tandem:latest"),
    "starts in every profile": ("grafana", "profiles", []),
    "is not read_only": ("tandem-gpu", "read_only", False),
    "may gain privileges": ("tandem-cpu", "security_opt", []),
    "on all interfaces": ("tandem-cpu", "ports", ["8000:8000"]),
    "which does not exist": ("prometheus", "volumes", ["./prometeus:/etc/prometheus:ro"]),
    "may write to": ("prometheus", "volumes", ["./prometheus:/etc/prometheus"]),
    "is not declared": ("grafana", "volumes", ["graphana:/var/lib/grafana"]),
    "has no file": ("grafana", "secrets", ["password"]),
    "give it as a secret": ("grafana", "environment", {"GF_SECURITY_ADMIN_PASSWORD": "admin"}),
}


@pytest.mark.parametrize("told", BROKEN_COMPOSE)
def test_a_broken_compose_file_is_told_its_fault(told):
    service, key, value = BROKEN_COMPOSE[told]
    broken = copy.deepcopy(COMPOSE)
    broken["services"][service][key] = value
    assert any(problem.startswith(f"{service}: ") and told in problem for problem in compose_problems(broken))


def tool_of(name: str) -> str | None:
    """A command of this environment, or of the machine."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def test_compose_follows_the_specification():
    tool = tool_of("check-jsonschema")
    if tool is None:
        pytest.skip("check-jsonschema is not installed: the compose file is not held against the Compose schema")
    command = [tool, "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_hadolint_has_no_complaint():
    tool = tool_of("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed: the Dockerfile is not linted")
    done = subprocess.run([tool, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_asks_grafana_and_prometheus_for_what_is_mounted():
    grafana, prometheus = COMPOSE["services"]["grafana"], COMPOSE["services"]["prometheus"]
    boards = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/tandem.yml").read_text())
    mounted = {volume.split(":")[1] for volume in grafana["volumes"] + prometheus["volumes"]}
    assert boards["providers"][0]["options"]["path"] in mounted
    assert "PROMETHEUS_URL" in grafana["environment"]
    targets = yaml.safe_load((DEPLOY / "compose/targets.yml").read_text())
    alias = COMPOSE["services"]["tandem-cpu"]["networks"]["default"]["aliases"][0]
    assert targets[0]["targets"] == [f"{alias}:{parse(TEXT).last('cpu', 'EXPOSE').text}"]


@pytest.mark.parametrize("name", LOCKS)
def test_locks_satisfy_the_project(name):
    extras = {"cpu": ["otel", "cpu"], "cuda": ["otel"]}[name]
    wanted = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, wanted):
        version = LOCKS[name].get(requirement.name.lower())
        assert version is not None, f"{requirement.name} is not locked; run python -m deploy.lock"
        assert requirement.specifier.contains(Version(version).public.partition("+")[0]), f"{requirement} has {version}"


@pytest.mark.parametrize("name", LOCKS)
def test_no_locked_package_has_a_known_hole(name):
    for package, floor in FLOORS.items():
        assert Version(LOCKS[name][package]) >= Version(floor)


def test_both_images_hold_the_same_versions():
    shared = LOCKS["cpu"].keys() & LOCKS["cuda"].keys() - {"torch"}
    assert {name: LOCKS["cpu"][name] for name in shared} == {name: LOCKS["cuda"][name] for name in shared}
    assert LOCKS["cpu"]["torch"] == LOCKS["cuda"]["torch"] + "+cpu"


def test_labels_tell_the_version_and_the_base():
    labels = parse(TEXT).stages["final"].all("LABEL")[0].pairs()
    assert labels["org.opencontainers.image.version"] == PROJECT["version"]
    assert "@" + labels["org.opencontainers.image.base.digest"] == DIGEST


def test_the_build_context_holds_what_the_wheel_is_made_of_and_nothing_else():
    is_ignored = ignored((ROOT / ".dockerignore").read_text())
    left_in = ["README.md", "serve/cli.py", "models/embedded/tandem-text/model.safetensors", "deploy/locks/cpu.txt"]
    left_out = [
        ".git/config",
        ".env",
        "tests/tiny.py",
        "k8s/base/service.yaml",
        "deploy/Dockerfile",
        "serve/__pycache__/cli.cpython-311.pyc",
        "models/embedded/.train/checkpoint.pt",
        "serve/.env",
        "build/lib/serve/cli.py",
    ]
    assert not [path for path in left_in if is_ignored(path)]
    assert [path for path in left_out if is_ignored(path)] == left_out
    weights = [path for path in context_files(ROOT, "models", is_ignored) if path.suffix == ".safetensors"]
    assert weights and all(path.parts[:2] == ("models", "embedded") for path in weights)


def test_triton_gets_the_object_compiled_from_its_very_source(tmp_path):
    """As Triton calls its compiler; another source is refused, and says why."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "triton-cc").mkdir()
    shutil.copy(DEPLOY / "triton-cc", tmp_path / "bin" / "cc")
    source, target = tmp_path / "cuda_utils.c", tmp_path / "cuda_utils.so"
    source.write_text("int known;")
    (tmp_path / "triton-cc" / f"{hashlib.sha256(b'int known;').hexdigest()}.so").write_bytes(b"compiled")
    command = [str(tmp_path / "bin" / "cc"), str(source), "-O3", "-shared", "-o", str(target), "-lcuda", "-I/usr"]
    subprocess.run(command, check=True)
    assert target.read_bytes() == b"compiled"
    source.write_text("int other;")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "this image has no compiler" in refused.stderr
