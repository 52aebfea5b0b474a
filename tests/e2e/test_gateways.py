"""Several gateways on one machine, without Ray."""

from __future__ import annotations

import pytest
from gateways import a_gateways_death_costs_its_own_connections_only
from serving import serving
from tiny import tiny_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", num_hidden_layers=16, max_position_embeddings=4096)
    served = (str(folder), "--served-model-name", "tiny", "--threads", "1", "--num-gateways", "2")
    with serving(*served, "--no-ray") as running:
        yield running


def test_a_killed_gateway_costs_its_own_connections_and_is_started_again(server):
    a_gateways_death_costs_its_own_connections_only(server, lambda: server.children("gateway"))
