"""Several gateways on a Ray cluster: where they are, the death of one, and leaving."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from gateways import a_gateways_death_costs_its_own_connections_only, spread
from serving import eventually, serving
from tiny import tiny_folder

from serve.deployments import app
from serve.errors import ConfigError
from serve.options import GatewayOptions, ModelOptions, ServeOptions

OPEN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
TITLE = "ServeReplica:tandem:gateway"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, raylets of this machine."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in OPEN}
    children = {child.pid for child in psutil.Process().children()}
    os.environ.update(OPEN)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        made.add_node(num_cpus=2)
        yield made
    finally:
        with contextlib.suppress(Exception):
            made.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        left = [child for child in psutil.Process().children() if child.pid not in children]
        for process in [each for child in left for each in [*child.children(recursive=True), child]]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", num_hidden_layers=16, max_position_embeddings=4096)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    served = (
        str(folder),
        "--served-model-name",
        "tiny",
        "--threads",
        "1",
        "--num-gateways",
        "2",
        "--drain-timeout-s",
        "60",
    )
    with serving(*served, "--ray-address", cluster.address, "--port", str(port), timeout_s=180, **OPEN) as running:
        yield running


def gateways() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if TITLE in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.ray
def test_each_node_has_one(server):
    assert len(gateways()) == 2
    assert len({gateway.ppid() for gateway in gateways()}) == 2  # workers are children of their node's raylet


@pytest.mark.ray
def test_a_killed_gateway_costs_its_own_connections_and_is_started_again_on_its_node(server):
    nodes = {gateway.ppid() for gateway in gateways()}
    a_gateways_death_costs_its_own_connections_only(server, gateways)
    assert {gateway.ppid() for gateway in gateways()} == nodes


@pytest.mark.ray
def test_leaving_drains_every_gateway(server):
    """Last of those that share the server: it ends it."""
    at = spread(server, gateways(), num_tokens=600)
    readers = [reader for each in at.values() for reader in each]
    server.process.terminate()
    eventually(lambda: any("stopping" in line for line in server.lines), within_s=30)
    for reader in readers:
        reader.join(90)
        assert reader.has_ended and not reader.error
    assert server.process.wait(90) == 0


@pytest.mark.parametrize(
    ("num_gateways", "num_nodes", "most"), [(2, 2, 1), (3, 2, 2), (2, 3, 1), (2, 1, None), (1, 3, None)]
)
def test_a_node_takes_its_share_of_the_gateways_and_no_more(monkeypatch, num_gateways, num_nodes, most):
    """Where there is a share, an update cannot start the new one beside the old one."""
    monkeypatch.setattr(app, "num_nodes", lambda: num_nodes)
    placed = app._spread(num_gateways)
    assert (placed.get("max_replicas_per_node"), "max_surge_percent" in placed) == (most, most is None)


def test_several_gateways_on_a_cluster_need_a_port_to_share():
    options = ServeOptions(models=(ModelOptions(model="tandem-text"),), gateway=GatewayOptions(port=0, num_gateways=2))
    with pytest.raises(ConfigError, match=r"port is 0.*num_gateways is 2.*give its number"):
        app.build_application(options)
