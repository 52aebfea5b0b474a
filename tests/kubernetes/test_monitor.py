"""Prometheus makes one target of all gateway pods of a Ray cluster, by the relabelling of its ServiceMonitor."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from broken_manifests import good


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: the monitor's relabelling is not tried")
def test_two_gateway_pods_become_one_target(tmp_path):
    [monitor] = [manifest for manifest in good("production") if manifest["kind"] == "ServiceMonitor"]
    [endpoint] = monitor["spec"]["endpoints"]
    relabel = [{_snake(key): value for key, value in rule.items()} for rule in endpoint["relabelings"]]
    pods = [{"targets": [f"10.0.0.{n}:8100"], "labels": _discovered(f"gateway-{n}")} for n in (1, 2)]
    job = {"job_name": "any", "static_configs": pods, "relabel_configs": relabel}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    command = ["promtool", "check", "service-discovery", "--timeout=2s", "prometheus.yml", "any"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = [found["labels"] for found in json.loads(done.stdout)]
    assert first == second  # which Prometheus scrapes once
    assert first["__address__"] == "tandem-gateway.tandem.svc:80" and first["job"] == "tandem"


def _discovered(pod: str) -> dict[str, str]:
    """What the operator's own relabelling leaves on a target, before the monitor's."""
    meta = {"__meta_kubernetes_service_name": "tandem-gateway", "__meta_kubernetes_namespace": "tandem"}
    return {**meta, "namespace": "tandem", "service": "tandem-gateway", "pod": pod, "endpoint": "http", "node": pod}


def _snake(name: str) -> str:
    return re.sub(r"([A-Z])", lambda found: "_" + found[0].lower(), name)
