"""Names, labels, and that what an object names is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from serve.kubernetes.kustomize import identity
from serve.kubernetes.overlay import Overlay, Pod, matches

Said = Iterator[tuple[str, str]]

MAX_RAYSERVICE_NAME = 47
"""Of KubeRay, which makes longer names of it (MaxRayServiceNameLength in `ray-operator/.../utils/constant.go`)."""
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


def names_are_valid(overlay: Overlay) -> Said:
    """RFC 1123 for all, RFC 1035 and short for a RayService."""
    for manifest in overlay.objects:
        name = manifest["metadata"].get("name", "")
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
            yield identity(manifest), f"the name {name!r} is not lower-case letters, digits, '-' and '.'"
        if manifest["kind"] == "RayService" and not re.fullmatch(
            rf"[a-z][a-z0-9-]{{0,{MAX_RAYSERVICE_NAME - 1}}}", name
        ):
            yield (
                identity(manifest),
                f"KubeRay wants a name of at most {MAX_RAYSERVICE_NAME} characters from a letter on",
            )


def labels_are_valid(overlay: Overlay) -> Said:
    places = [(identity(manifest), manifest["metadata"].get("labels", {})) for manifest in overlay.objects]
    for where, labels in places + [(pod.place, pod.labels) for pod in overlay.pods]:
        for key, value in labels.items():
            if not isinstance(value, str):
                yield where, f"the label {key!r} is {value!r}, not a string; put it in quotes"
            elif not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield where, f"{key}={value} is no valid label"


def one_namespace(overlay: Overlay) -> Said:
    """Everything lies in one namespace: selectors and references do not cross them."""
    found = {manifest["metadata"].get("namespace", "") for manifest in overlay.objects}
    if len(found) > 1:
        yield overlay.name, f"its objects lie in {', '.join(sorted(map(repr, found)))}; set `namespace` in the overlay"


def references_exist(overlay: Overlay) -> Said:
    """Every ConfigMap, Secret, claim and account that a pod names, and the keys it takes of them."""
    for pod in overlay.pods:
        for kind, name, key, optional in _references(pod):
            target = overlay.get(kind, name)
            if target is None and not optional and f"{kind}/{name}" not in overlay.external:
                yield (
                    pod.place,
                    f"names the {kind} {name!r}, which is not defined; define it, or pass --external {kind}/{name}",
                )
            if target is not None and key and key not in {**target.get("data", {}), **target.get("stringData", {})}:
                yield pod.place, f"takes {key!r} of the {kind} {name!r}, which holds no such key"


def mounts_have_volumes(overlay: Overlay) -> Said:
    for pod in overlay.pods:
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
        for container in pod.containers:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in volumes:
                    yield pod.place, f"mounts the volume {mount['name']!r}, which the pod does not have"
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", ())}
        for name in sorted(volumes - mounted):
            yield pod.place, f"has the volume {name!r}, which no container mounts"


def services_lead_to_pods(overlay: Overlay) -> Said:
    """A Service's selector finds pods, and each of them has its ports."""
    for service in overlay.of("Service"):
        selector = {"matchLabels": service["spec"].get("selector", {})}
        found = [pod for pod in overlay.pods if pod.is_service and matches(selector, pod.labels)]
        if not found or not selector["matchLabels"]:
            yield identity(service), f"selects no pod: none has the labels {selector['matchLabels']}"
        for pod in found:
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                if pod.port(target) is None:
                    yield identity(service), f"leads to the port {target!r}, which {pod.place} does not have"


def selectors_find_pods(overlay: Overlay) -> Said:
    """Of budgets, policies, deployments and spread constraints: one that finds nothing protects nothing."""
    labels = [pod.labels for pod in overlay.pods]
    for manifest in overlay.of("PodDisruptionBudget", "NetworkPolicy"):
        selector = manifest["spec"].get("podSelector" if manifest["kind"] == "NetworkPolicy" else "selector", {})
        if not any(matches(selector, held) for held in labels):
            yield identity(manifest), f"its selector {selector} finds no pod"
    for manifest in overlay.of("Deployment", "StatefulSet"):
        if not matches(manifest["spec"]["selector"], manifest["spec"]["template"]["metadata"].get("labels", {})):
            yield identity(manifest), "its selector does not find its own pods"
    for pod in overlay.pods:
        for spread in pod.spec.get("topologySpreadConstraints", ()):
            if not matches(spread.get("labelSelector", {}), pod.labels):
                yield pod.place, "its topologySpreadConstraints count other pods than its own"


def routes_lead_to_services(overlay: Overlay) -> Said:
    """HTTPRoute to Service and its port, to a Gateway and its listener."""
    for route in overlay.of("HTTPRoute"):
        for rule in route["spec"].get("rules", ()):
            for backend in rule.get("backendRefs", ()):
                service = overlay.get("Service", backend["name"])
                ports = [port["port"] for port in service["spec"]["ports"]] if service else []
                if backend.get("port") not in ports:
                    yield (
                        identity(route),
                        f"leads to {backend['name']}:{backend.get('port')}, which is no Service's port here",
                    )
        for parent in route["spec"].get("parentRefs", ()):
            yield from _listener(overlay, route, parent)


def monitors_find_services(overlay: Overlay) -> Said:
    for monitor in overlay.of("ServiceMonitor"):
        selector, found = monitor["spec"]["selector"], []
        found = [s for s in overlay.of("Service") if matches(selector, s["metadata"].get("labels", {}))]
        if not found:
            yield identity(monitor), f"its selector {selector} finds no Service"
        for endpoint in monitor["spec"]["endpoints"]:
            for service in found:
                if endpoint.get("port") not in [port.get("name") for port in service["spec"]["ports"]]:
                    yield (
                        identity(monitor),
                        f"scrapes the port {endpoint.get('port')!r}, which {identity(service)} does not have",
                    )


def _listener(overlay: Overlay, route: dict[str, Any], parent: dict[str, Any]) -> Said:
    gateway = overlay.get("Gateway", parent["name"])
    if gateway is None:
        if f"Gateway/{parent['name']}" not in overlay.external:
            yield identity(route), f"its parent is the Gateway {parent['name']!r}, which is not defined"
        return
    listeners = {listener["name"]: listener for listener in gateway["spec"]["listeners"]}
    name = parent.get("sectionName")
    if name is not None and name not in listeners:
        yield identity(route), f"asks for the listener {name!r} of {identity(gateway)}, which has {sorted(listeners)}"
        return
    hosts = {listener.get("hostname") for key, listener in listeners.items() if name in (None, key)}
    for host in route["spec"].get("hostnames", ()):
        if None not in hosts and host not in hosts:
            yield identity(route), f"the host name {host!r} is none that its listener of {identity(gateway)} takes"


def _references(pod: Pod) -> Iterator[tuple[str, str, str, bool]]:
    """(kind, name, key, is optional)."""
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"], "", pod.spec["serviceAccountName"] == "default"
    for volume in pod.spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], "", volume["configMap"].get("optional", False)
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], "", volume["secret"].get("optional", False)
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], "", False
    for container in pod.containers:
        for variable in container.get("env", ()):
            for source, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if found := variable.get("valueFrom", {}).get(source):
                    yield kind, found["name"], found["key"], found.get("optional", False)
        for variables in container.get("envFrom", ()):
            for source, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if found := variables.get(source):
                    yield kind, found["name"], "", found.get("optional", False)


RULES = (
    names_are_valid,
    labels_are_valid,
    one_namespace,
    references_exist,
    mounts_have_volumes,
    services_lead_to_pods,
    selectors_find_pods,
    routes_lead_to_services,
    monitors_find_services,
)
