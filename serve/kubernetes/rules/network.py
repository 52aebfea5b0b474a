"""NetworkPolicies against the connections that Tandem makes: none is blocked, and nothing else gets through.

What is needed follows from the manifests themselves: `rayStartParams` pin Ray's ports, the config file names the
gateway's and the channel's. What is allowed is what Kubernetes makes of the policies: a connection passes when the
source's egress and the target's ingress both let it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

from serve.kubernetes.kustomize import Manifest, identity
from serve.kubernetes.overlay import Overlay, Pod, matches
from serve.kubernetes.rules.ray import gpus_of

Said = Iterator[tuple[str, str]]
Ports = int
"""A set of ports as an integer whose bits they are: sets of tens of thousands are compared at once."""

NONE: Ports = 0
LOCAL_PORTS = "net.ipv4.ip_local_port_range"


def _span(first: int, last: int | None = None) -> Ports:
    last = first if last is None else last
    return (1 << last + 1) - (1 << first) if first <= last else NONE


ALL = _span(1, 65535)
API_SERVER = _span(443) | _span(6443)
HTTPS = _span(443)


def pods_are_isolated(overlay: Overlay) -> Said:
    """A pod that no policy selects can be reached by everybody, and reaches everybody."""
    for pod in overlay.pods:
        for direction in ("Ingress", "Egress"):
            if not _policies(overlay, pod, direction):
                yield pod.place, f"no NetworkPolicy says what {direction} it has: everything is open"


def needed_connections_pass(overlay: Overlay) -> Said:
    for source, target, ports, reason in _needed(overlay):
        blocked = ports & ~passing(overlay, source, target)
        if blocked:
            yield target.place, f"no NetworkPolicy lets {source.role} through to port {told(blocked)} ({reason})"


def nothing_else_passes(overlay: Overlay) -> Said:
    """Between Tandem's own pods."""
    needed: dict[tuple[str, str], Ports] = {}
    for source, target, ports, _ in _needed(overlay):
        needed[source.place, target.place] = needed.get((source.place, target.place), NONE) | ports
    for source in overlay.pods:
        for target in overlay.pods:
            surplus = passing(overlay, source, target) & ~needed.get((source.place, target.place), NONE)
            if surplus:
                yield (
                    target.place,
                    f"a NetworkPolicy lets {source.role} through to port {told(surplus)}, which nothing needs",
                )


def strangers_reach_only_the_gateway(overlay: Overlay) -> Said:
    """And KubeRay's operator the head's dashboard. A peer without a selector is everybody."""
    for pod in overlay.pods:
        for policy in _policies(overlay, pod, "Ingress"):
            for rule in policy["spec"].get("ingress", ()):
                ports = _ports(rule, pod)
                for peer in rule.get("from") or [{}]:
                    if _is_foreign(peer):
                        surplus = ports & ~_open_to(overlay, pod, peer)
                        if surplus:
                            yield identity(policy), f"lets others in to port {told(surplus)} of {pod.place}"


def clients_reach_the_gateway(overlay: Overlay) -> Said:
    """Somebody may: a policy without the gateway's port shuts the API."""
    for pod in overlay.gateways if overlay.options else ():
        rules = [rule for p in _policies(overlay, pod, "Ingress") for rule in p["spec"].get("ingress", ())]
        if overlay.options and not any(_ports(rule, pod) & _span(overlay.options.gateway.port) for rule in rules):
            yield pod.place, f"no NetworkPolicy lets anybody in to port {overlay.options.gateway.port} (the API)"


def pods_reach_only_what_they_need(overlay: Overlay) -> Said:
    """Outside: names for all, the hub for the download, Kubernetes for Ray's autoscaler."""
    for pod in overlay.pods:
        allowed = {"download": HTTPS, "head": API_SERVER if _scales(pod) else NONE}.get(pod.role, NONE)
        reached = NONE
        has_names = False
        for policy in _policies(overlay, pod, "Egress"):
            for rule in policy["spec"].get("egress", ()):
                for peer in rule.get("to") or [{}]:
                    if "namespaceSelector" in peer and _port_numbers(rule) == _span(53):
                        has_names = True
                    elif _is_foreign(peer):
                        reached |= _port_numbers(rule)
        if reached & ~allowed:
            yield pod.place, f"a NetworkPolicy lets it out to port {told(reached & ~allowed)} of others"
        if allowed & ~reached:
            yield pod.place, f"no NetworkPolicy lets it out to port {told(allowed & ~reached)}, which it needs"
        if not has_names:
            yield pod.place, "no NetworkPolicy lets it ask for names (port 53 of kube-system)"


def _needed(overlay: Overlay) -> Iterator[tuple[Pod, Pod, Ports, str]]:
    """(from, to, ports, why): every connection between Tandem's pods."""
    ray = {pod.role: pod for pod in overlay.pods if pod.is_ray}
    for target in ray.values():
        params = target.ray_params
        for source in ray.values():
            yield source, target, _numbers(params, "object-manager-port", "node-manager-port"), "Ray's nodes"
            first, last = int(params.get("min-worker-port", 0)), int(params.get("max-worker-port", -1))
            yield source, target, _span(first, last), "Ray's workers"
        if "head" in ray:
            yield ray["head"], target, _numbers(params, "dashboard-agent-grpc-port"), "the dashboard and its agents"
            if target.role == "head":
                for source in (pod for pod in ray.values() if pod is not target):
                    yield source, target, _numbers(params, "port"), "the cluster's state"
    yield from _channels(overlay, ray)
    yield from _ranks(overlay, ray)
    redis = next((pod for pod in overlay.pods if pod.role == "redis"), None)
    if redis is not None and "head" in ray:
        port = redis.port("redis")
        yield ray["head"], redis, _span(port) if port else NONE, "the head's state"


def _channels(overlay: Overlay, ray: dict[str, Pod]) -> Iterator[tuple[Pod, Pod, Ports, str]]:
    """Gateways to replicas; both to the hub, which is in a gateway's pod."""
    if overlay.options is None or overlay.options.gateway.channel_ports is None:
        return
    first, _, last = overlay.options.gateway.channel_ports.partition("-")
    ports = _span(int(first), int(last))
    if {"gateway", "models"} <= ray.keys():
        yield ray["gateway"], ray["models"], ports, "the channel"
        yield ray["models"], ray["gateway"], ports, "the hub"
        yield ray["gateway"], ray["gateway"], ports, "the hub"


def _ranks(overlay: Overlay, ray: dict[str, Pod]) -> Iterator[tuple[Pod, Pod, Ports, str]]:
    """Ranks of one replica in several pods: at whatever ports torch and NCCL take."""
    models = ray.get("models")
    if models is None or overlay.options is None or not gpus_of(models):
        return
    if any(model.num_ranks * model.gpus_per_rank > gpus_of(models) for model in overlay.options.models):
        sysctls = {s["name"]: s["value"] for s in models.spec.get("securityContext", {}).get("sysctls", ())}
        first, last = map(int, sysctls.get(LOCAL_PORTS, "1 65535").split())
        yield models, models, _span(first, last), "ranks of one model on several nodes"


def passing(overlay: Overlay, source: Pod, target: Pod) -> Ports:
    """The TCP ports of `target` that policies let `source` reach."""
    return _side(overlay, target, source, "Ingress", target) & _side(overlay, source, target, "Egress", target)


def _side(overlay: Overlay, pod: Pod, other: Pod, direction: str, target: Pod) -> Ports:
    policies = _policies(overlay, pod, direction)
    if not policies:
        return ALL
    found = NONE
    for policy in policies:
        for rule in policy["spec"].get(direction.lower(), ()):
            peers = rule.get("from" if direction == "Ingress" else "to") or [{"podSelector": {}}]
            if any(
                "podSelector" in peer and not _is_foreign(peer) and matches(peer["podSelector"], other.labels)
                for peer in peers
            ):
                found |= _ports(rule, target)
    return found


def _policies(overlay: Overlay, pod: Pod, direction: str) -> list[Manifest]:
    return [
        policy
        for policy in overlay.of("NetworkPolicy")
        if matches(policy["spec"].get("podSelector", {}), pod.labels)
        and direction in policy["spec"].get("policyTypes", ["Ingress"])
    ]


def _ports(rule: dict[str, Any], target: Pod) -> Ports:
    """The TCP ports of a rule at `target`; all of them where it names none."""
    if not rule.get("ports"):
        return ALL
    found = NONE
    for port in rule["ports"]:
        if port.get("protocol", "TCP") != "TCP":
            continue
        number = port["port"] if isinstance(port["port"], int) else target.port(port["port"])
        if number is not None:
            found |= _span(number, port.get("endPort", number))
    return found


def _port_numbers(rule: dict[str, Any]) -> Ports:
    """Of a rule about others' pods, whatever the protocol."""
    if not rule.get("ports"):
        return ALL
    return reduce(or_, (_span(port["port"], port.get("endPort")) for port in rule["ports"]))


def _is_foreign(peer: dict[str, Any]) -> bool:
    """Speaks of others than the pods of this namespace."""
    return "podSelector" not in peer or "namespaceSelector" in peer or "ipBlock" in peer


def _open_to(overlay: Overlay, pod: Pod, peer: dict[str, Any]) -> Ports:
    if pod in overlay.gateways and overlay.options is not None:
        return _span(overlay.options.gateway.port)
    operator = peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/name") == "kuberay-operator"
    if pod.role == "head" and operator:
        return _numbers(pod.ray_params, "dashboard-port") | _span(pod.port("serve") or 8000)
    return NONE


def _scales(pod: Pod) -> bool:
    return bool(
        pod.owner["kind"] == "RayService" and pod.owner["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling")
    )


def _numbers(params: dict[str, str], *names: str) -> Ports:
    return reduce(or_, (_span(int(params[name])) for name in names if name in params), NONE)


def told(ports: Ports) -> str:
    """`8076, 10002-10999`."""
    spans: list[list[int]] = []
    for port in (number for number, bit in enumerate(reversed(f"{ports:b}")) if bit == "1"):
        if spans and spans[-1][1] == port - 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


RULES = (
    pods_are_isolated,
    needed_connections_pass,
    nothing_else_passes,
    strangers_reach_only_the_gateway,
    clients_reach_the_gateway,
    pods_reach_only_what_they_need,
)
