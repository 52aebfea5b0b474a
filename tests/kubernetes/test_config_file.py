"""The config file in a ConfigMap is the one a laptop takes: it serves here, at the port that it says and no other."""

from __future__ import annotations

import socket

import httpx
import psutil
from broken_manifests import K8S, good
from serving import serving

from serve.kubernetes.kustomize import identity


def test_the_config_map_of_cpu_dev_serves_here_and_listens_at_one_port(tmp_path):
    [held] = [m["data"]["config.yaml"] for m in good("cpu-dev") if identity(m).startswith("ConfigMap/tandem-config")]
    file, keys = tmp_path / "config.yaml", tmp_path / "api-keys"
    file.write_text(held)
    assert held == (K8S / "overlays/cpu-dev/config.yaml").read_text()
    keys.write_text("sk-try-me\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    given = ("--no-ray", "--config", str(file), "--api-key-file", str(keys), "--port", str(port))
    with serving(*given) as running:
        asked = {
            "model": "tandem-text",
            "messages": [{"role": "user", "content": "What is 27 + 58?"}],
            "temperature": 0,
        }
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer sk-try-me"}
        assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 401
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=60).json()
        assert "85" in answer["choices"][0]["message"]["content"]
        assert [httpx.get(f"{url}{path}").status_code for path in ("/livez", "/readyz", "/health")] == [200] * 3
        processes = [psutil.Process(running.process.pid), *running.children()]
        listening = {
            (connection.laddr.ip, connection.laddr.port)
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {("0.0.0.0", port)}
