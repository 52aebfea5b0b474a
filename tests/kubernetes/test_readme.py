"""k8s/README.md speaks of what is there: files, names, labels, ports; and stays within eight commands."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from broken_manifests import K8S, OVERLAYS, good

from serve.kubernetes.check import EXTERNAL
from serve.kubernetes.kustomize import identity, load_documents
from serve.kubernetes.overlay import Overlay

TEXT = (K8S / "README.md").read_text()
BLOCKS = re.findall(r"```shell\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
STARTS = {name: b for b in BLOCKS for name in re.findall(r"apply -k k8s/overlays/(\S+)", b) if "curl" in b}
PORTS = TEXT.split("## Ports")[1].split("Out:")[0]


def overlays_of(command: str) -> list[str]:
    """Those that a command may be for: the block's own, else all."""
    blocks = [name for name, block in STARTS.items() if command in block.splitlines()]
    return blocks or list(OVERLAYS)


@pytest.mark.parametrize("overlay", sorted(STARTS))
def test_an_overlay_answers_after_eight_commands_at_most(overlay):
    commands = STARTS[overlay].splitlines()
    assert len(commands) <= 8 and commands[-1].startswith("curl ")
    body = json.loads(shlex.split(commands[-1])[-1])
    options = Overlay(overlay, good(overlay)).options
    assert body["model"] in [name for model in options.models for name in (model.served_model_name or (model.name,))]


def test_every_overlay_has_its_row_and_its_way():
    assert all(f"| `{overlay}` |" in TEXT for overlay in OVERLAYS)
    told = {name for name in OVERLAYS if name in STARTS or f"`{name}`" in TEXT.split("```shell")[2]}
    assert told | {"multi-gpu-tp", "multi-node"} == set(OVERLAYS)


def test_every_secret_that_manifests_name_is_made_by_a_command():
    made = re.findall(r"create secret (?:generic|tls) (\S+)", TEXT)
    assert {name.removeprefix("Secret/") for name in EXTERNAL} - {"tandem-redis"} <= set(made)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "kubectl" in command])
def test_a_command_names_what_is_there(command):
    for path in re.findall(r"-[fk] (k8s/\S+)", command):
        assert (K8S.parent / path).exists()
    for kind, name in re.findall(r"\b(rayservice|deployment|service|job)/([a-z-]+)", command):
        known = {identity(m).lower() for overlay in overlays_of(command) for m in good(overlay)}
        assert f"{kind}/{name}" in known
    for label, value in re.findall(r"-l ([a-z./-]+)=([a-z-]+)", command):
        pods = [pod for overlay in OVERLAYS for pod in Overlay(overlay, good(overlay)).pods]
        assert any(pod.labels.get(label) == value for pod in pods)
    if " -n " in command:
        [namespace] = {m["metadata"]["name"] for m in load_documents(K8S / "namespace.yaml")}
        spaces = {m["metadata"]["namespace"] for o in OVERLAYS for m in good(o)}
        assert set(re.findall(r" -n (\S+)", command)) == {namespace} == spaces
    if "--type=json" in command:
        [operation] = json.loads(re.search(r"-p='(.*)'", command)[1])
        node = next(m for m in good("production") if m["kind"] == "RayService")
        for part in operation["path"].split("/")[1:]:
            node = node[int(part)] if isinstance(node, list) else node[part]


def test_images_of_the_commands_are_those_of_the_overlays():
    for overlay, block in STARTS.items():
        [tag] = re.findall(r"-t (\S+) \.", block)
        target = re.search(r"--target (\S+)", block)[1]
        images = {c["image"] for pod in Overlay(overlay, good(overlay)).pods for c in pod.containers}
        assert images == {tag} and tag.endswith(target)
    assert {"cpu", "cuda"} <= set(
        re.findall(r"^FROM \S+ AS (\S+)", (K8S.parent / "deploy/Dockerfile").read_text(), re.M)
    )


def test_every_port_of_the_manifests_has_its_row():
    rows = re.findall(r"^\| ([0-9, -]+) \|", PORTS, flags=re.M)
    told = {port for row in rows for port in row.split(", ")}
    for overlay in OVERLAYS:
        for pod in Overlay(overlay, good(overlay)).pods:
            ports = {str(port["containerPort"]) for container in pod.containers for port in container.get("ports", ())}
            params = {value for name, value in pod.ray_params.items() if name.endswith("port") and "worker" not in name}
            assert ports | params <= told
        allowed = [p for m in good(overlay) if m["kind"] == "NetworkPolicy" for p in _policy_ports(m)]
        assert set(allowed) <= told | {"53", "443", "6443"}


def _policy_ports(policy):
    for rule in [*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())]:
        for port in rule.get("ports", ()):
            yield f"{port['port']}-{port['endPort']}" if "endPort" in port else str(port["port"])
