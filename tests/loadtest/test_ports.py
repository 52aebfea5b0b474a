"""The scan of listening ports: it sees what listens, and allows only what its rules, and the README's table, say."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from loadtest.ports import RULES, Listener, listeners, rule_for

README = (Path(__file__).resolve().parents[2] / "deploy" / "README.md").read_text()
HUB, GATEWAY = "ray::ServeReplica:tandem:hub", "ray::ServeReplica:tandem:gateway"


def test_a_listening_socket_is_seen_with_its_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        [found] = [item for item in listeners(os.getpid()) if item.port == port]
    assert (found.address, found.pid, found.reach) == ("127.0.0.1", os.getpid(), "loopback")


@pytest.mark.parametrize(
    ("process", "address", "port", "is_meant"),
    [
        ("serve.process", "0.0.0.0", 8000, True),
        ("serve.process", "0.0.0.0", 8001, False),
        ("serve.process", "127.0.0.1", 8001, True),
        ("serve.ranks.peer", "192.0.2.7", 29500, False),
        (GATEWAY, "::", 8000, True),
        (HUB, "127.0.0.1", 40000, True),
        ("gcs_server", "::ffff:127.0.0.1", 40000, True),
        ("raylet", "::", 40000, True),
        ("ray::RuntimeEnvAgent", "192.0.2.7", 40000, True),
        ("ray monitor", "127.0.0.1", 44217, True),
        ("ray monitor", "0.0.0.0", 44217, False),
        ("nginx", "127.0.0.1", 80, False),
    ],
)
def test_only_what_the_rules_say_is_meant(process, address, port, is_meant):
    assert (rule_for(Listener(process, 1, address, port), api_port=8000) is not None) == is_meant


def test_the_readme_tells_every_rule():
    for rule in RULES:
        assert f"| {', '.join(rule.reach)} | {rule.purpose} |" in README
