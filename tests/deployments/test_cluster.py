"""A Ray cluster that was there before: joined and left by `tandem serve`, and driven by Ray Serve's own command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    """A head node of its own; ended by its processes, for `ray stop` would end those of others too."""
    port = free_port()
    ports = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port")
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus", "4",
         "--port", str(port),
         "--include-dashboard", "false", "--ray-client-server-port", str(free_port()),
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
        yield f"127.0.0.1:{port}"
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in processes:
            if process.is_running():
                process.kill()
        head.wait()


def applications(cluster: str) -> set[str]:
    """The Serve applications of the cluster, asked from another process."""
    code = (
        "import ray, sys; from ray import serve; ray.init(address=sys.argv[1], logging_level='ERROR'); "
        "print('apps', *serve.status().applications)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, cluster], cwd="/", env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("apps")] or [done.stderr]
    return set(line.split()[1:])


def test_ray_serves_own_command_gives_the_same_application_and_leaving_deletes_ours_alone(cluster, folder, tmp_path):
    port = free_port()
    config = tmp_path / "tandem.yaml"
    config.write_text(
        f"models: [{{model: {folder}, served_model_name: [tiny], threads: 1}}]\ngateway: {{port: {port}}}\n"
    )
    other = subprocess.Popen(
        [BIN / "serve", "run", "--address", cluster, "--name", "other", "--route-prefix", "/other",
         "--app-dir", str(ROOT), "serve.deployments.app:build", f"config={config}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env=ENVIRONMENT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert other.poll() is None, other.stdout.read().decode()
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        eventually(is_ready, within_s=120, every_s=0.5)
        with serving(str(folder), "--served-model-name", "tiny", "--ray-address", cluster, **OPEN) as server:
            for place in (server.url, url):
                asked = {"model": "tiny", "prompt": "the", "max_tokens": 4, "temperature": 0}
                answer = httpx.post(f"{place}/v1/completions", json=asked, timeout=60)
                assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
            assert applications(cluster) == {"other", "tandem"}
            assert server.terminate() == 0
        assert applications(cluster) == {"other"}
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        other.terminate()
        other.wait(timeout=60)
