"""A Ray cluster that was there before: joined and left by `tandem serve`, and driven by Ray Serve's own command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from serving import ROOT, eventually, serving
from tiny import tiny_folder

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent
OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""No token: the cluster of this test must not read or write the user's own."""
ENVIRONMENT = {**os.environ, **OPEN, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@dataclass(frozen=True)
class Cluster:
    address: str
    dashboard: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node of its own; ended by its processes, for `ray stop` would end those of others too."""
    port, dashboard = free_port(), free_port()
    ports = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port")
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus", "4",
         "--port", str(port),
         "--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
         "--ray-client-server-port", str(free_port()),
         *(word for name in ports for word in (name, str(free_port())))],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = []
        for line in head.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(lines))
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in processes:
            if process.is_running():
                process.kill()
        head.wait()


def applications(cluster: Cluster) -> set[str]:
    """The Serve applications of the cluster, asked from another process."""
    code = (
        "import ray, sys; from ray import serve; ray.init(address=sys.argv[1], logging_level='ERROR'); "
        "print('apps', *serve.status().applications)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, cluster.address],
        cwd="/",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("apps")] or [done.stderr]
    return set(line.split()[1:])


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def serve(*arguments: str | Path) -> None:
    """Ray Serve's own command."""
    done = subprocess.run(
        [BIN / "serve", *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_serve_deploy_of_the_shipped_file_answers_until_serve_shutdown(cluster, tmp_path):
    """First here, for it starts Serve itself, and ends it."""
    port, file = free_port(), tmp_path / "ray-serve.yaml"
    url = f"http://127.0.0.1:{port}"
    shipped = (ROOT / "deploy" / "ray-serve.yaml").read_text()
    assert "port: 8000" in shipped
    file.write_text(shipped.replace("port: 8000", f"port: {port}"))
    serve("deploy", file, "--address", cluster.dashboard)
    eventually(lambda: is_ready(url), within_s=150, every_s=0.5)
    [model] = httpx.get(f"{url}/v1/models").json()["data"]
    messages = [{"role": "user", "content": "What is 27 + 58?"}]
    body = {"model": model["id"], "messages": messages, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert "85" in answer["choices"][0]["message"]["content"]
    assert applications(cluster) == {"tandem"}
    serve("shutdown", "--yes", "--address", cluster.dashboard)
    eventually(lambda: not is_ready(url), within_s=90, every_s=0.5)
    eventually(lambda: applications(cluster) == set(), within_s=60, every_s=1.0)


def test_ray_serves_own_command_gives_the_same_application_and_leaving_deletes_ours_alone(cluster, folder, tmp_path):
    port = free_port()
    config = tmp_path / "tandem.yaml"
    config.write_text(
        f"models: [{{model: {folder}, served_model_name: [tiny], threads: 1}}]\ngateway: {{port: {port}}}\n"
    )
    other = subprocess.Popen(
        [BIN / "serve", "run", "--address", cluster.address, "--name", "other", "--route-prefix", "/other",
         "--app-dir", str(ROOT), "serve.deployments.app:build", f"config={config}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env=ENVIRONMENT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def has_started() -> bool:
        assert other.poll() is None, other.stdout.read().decode()
        return is_ready(url)

    try:
        eventually(has_started, within_s=120, every_s=0.5)
        with serving(str(folder), "--served-model-name", "tiny", "--ray-address", cluster.address, **OPEN) as server:
            for place in (server.url, url):
                asked = {"model": "tiny", "prompt": "the", "max_tokens": 4, "temperature": 0}
                answer = httpx.post(f"{place}/v1/completions", json=asked, timeout=60)
                assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
            assert applications(cluster) == {"other", "tandem"}
            assert server.terminate() == 0
        assert applications(cluster) == {"other"}
        assert is_ready(url)
    finally:
        other.terminate()
        other.wait(timeout=60)
