"""What every pod must be: confined, bounded, pinned, and watched by probes that mean three different things."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from serve.kubernetes.kustomize import split_image
from serve.kubernetes.overlay import Overlay, Pod, quantity

Said = Iterator[tuple[str, str]]

GATEWAY_ROUTES = {"startupProbe": ("/livez", "/health"), "readinessProbe": ("/readyz",), "livenessProbe": ("/livez",)}
"""Routes of the gateway, and the probes they are meant for (`serve/gateway/pages.py`)."""
RAY_ROUTES = {
    "dashboard-agent-listen-port": ("/api/local_raylet_healthz", "/api/healthz"),
    "dashboard-port": ("/api/gcs_healthz",),
}
"""Ray's own, open without its token, by the `ray start` flag that names their port."""
SERVE_PROXY_ROUTE = "/-/healthz"
SLOW_TO_KILL_S = 60.0
"""A liveness probe that fails for less does not restart anything."""
QUICK_TO_LEAVE_S = 20.0
"""An unready pod is out of its Service after this at the latest."""


def pods_are_confined(overlay: Overlay) -> Said:
    """Kubernetes' pod security level `restricted`, for every container."""
    for pod in overlay.pods:
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(key):
                yield pod.place, f"{key} is true; leave it out"
        if any("hostPath" in volume for volume in pod.spec.get("volumes", ())):
            yield pod.place, "mounts a hostPath; use a claim or an emptyDir"
        for container in pod.containers:
            for problem in _unconfined(pod.spec.get("securityContext", {}), container.get("securityContext", {})):
                yield pod.place, f"container {container['name']}: {problem}"


def root_is_read_only(overlay: Overlay) -> Said:
    """But with a GPU: NVIDIA's CDI hook writes into the container's root as it starts. /tmp and HOME can be written."""
    for pod in overlay.pods:
        for container in pod.containers:
            is_read_only = container.get("securityContext", {}).get("readOnlyRootFilesystem") is True
            if not is_read_only and not gpus(container):
                yield pod.place, f"container {container['name']}: readOnlyRootFilesystem is not true, and it has no GPU"
            home = next((v.get("value") for v in container.get("env", ()) if v["name"] == "HOME"), None)
            for path in ("/tmp", home) if is_read_only and home else ():
                mounts = [
                    m for m in container.get("volumeMounts", ()) if m["mountPath"] == path and not m.get("readOnly")
                ]
                if not mounts:
                    yield pod.place, f"container {container['name']}: nothing writable is mounted at {path}"


def service_accounts_give_nothing(overlay: Overlay) -> Said:
    """No token of Kubernetes in a pod, but in the head's where Ray's autoscaler asks for pods."""
    for pod in overlay.pods:
        scales = pod.owner["kind"] == "RayService" and pod.owner["spec"]["rayClusterConfig"].get(
            "enableInTreeAutoscaling"
        )
        needs = bool(scales and pod.role == "head")
        if needs and pod.spec.get("automountServiceAccountToken") is False:
            yield pod.place, "automountServiceAccountToken is false, and the autoscaler needs the token; set it to true"
        if not needs and pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.place, "automountServiceAccountToken is not false; nothing here speaks to Kubernetes"


def resources_are_bounded(overlay: Overlay) -> Said:
    """Requests and limits of CPU and memory; requests within limits; GPUs asked for as they are limited."""
    for pod in overlay.pods:
        for container in pod.containers:
            where = f"container {container['name']}"
            requests, limits = (container.get("resources", {}).get(key, {}) for key in ("requests", "limits"))
            for name in ("cpu", "memory"):
                least, most = quantity(requests.get(name)), quantity(limits.get(name))
                if least is None or most is None:
                    yield pod.place, f"{where}: {name} has no {'request' if least is None else 'limit'}"
                elif least > most:
                    yield pod.place, f"{where}: asks for more {name} ({requests[name]}) than its limit ({limits[name]})"
            if requests.get("nvidia.com/gpu", limits.get("nvidia.com/gpu")) != limits.get("nvidia.com/gpu"):
                yield pod.place, f"{where}: nvidia.com/gpu is asked for and limited differently"


def volumes_are_bounded(overlay: Overlay) -> Said:
    """An emptyDir without a limit fills the node; one in memory counts against the container's memory."""
    for pod in overlay.pods:
        in_memory = 0.0
        for volume in pod.spec.get("volumes", ()):
            held = volume.get("emptyDir")
            if held is None:
                continue
            size = quantity(held.get("sizeLimit"))
            if size is None:
                yield pod.place, f"the emptyDir {volume['name']!r} has no sizeLimit"
            elif held.get("medium") == "Memory":
                in_memory += size
        limits = [quantity(c.get("resources", {}).get("limits", {}).get("memory")) for c in pod.spec["containers"]]
        if in_memory and in_memory >= sum(limit or 0.0 for limit in limits):
            yield pod.place, f"volumes in memory may take {in_memory / 2**30:g} GiB, all that its containers may have"


def shared_memory_is_mounted(overlay: Overlay) -> Said:
    """Containers have 64 MiB of /dev/shm: too little for Ray's objects and for NCCL."""
    for pod in overlay.pods:
        if pod.is_ray or any(gpus(container) for container in pod.containers):
            volume = pod.volume_at("/dev/shm")
            if volume is None or volume.get("emptyDir", {}).get("medium") != "Memory":
                yield pod.place, "no emptyDir with medium Memory is mounted at /dev/shm"
                continue
            objects = quantity(pod.ray_params.get("object-store-memory"))
            size = quantity(volume["emptyDir"].get("sizeLimit"))
            if objects is not None and size is not None and objects > size:
                yield pod.place, f"object-store-memory is {objects / 2**20:g} MiB, more than /dev/shm has"


def images_are_pinned(overlay: Overlay) -> Said:
    for pod in overlay.pods:
        for container in pod.containers:
            _, tag, digest = split_image(container.get("image", ""))
            if not digest and (not tag or tag == "latest" or not any(c.isdigit() for c in tag)):
                yield (
                    pod.place,
                    f"the image {container.get('image')!r} can change under its name; give a digest or a version",
                )
            if digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                yield pod.place, f"the digest {digest!r} is not sha256: and 64 hex digits"


def gpus_are_scheduled(overlay: Overlay) -> Said:
    """A pod with GPUs tolerates their nodes' taint and goes nowhere else; others do not tolerate it."""
    for pod in overlay.pods:
        tolerates = any(t.get("key") == "nvidia.com/gpu" for t in pod.spec.get("tolerations", ()))
        if any(gpus(container) for container in pod.containers):
            if not tolerates:
                yield pod.place, "has GPUs and does not tolerate the taint nvidia.com/gpu of their nodes"
            if not pod.spec.get("nodeSelector") and not pod.spec.get("affinity"):
                yield pod.place, "has GPUs and no nodeSelector for their nodes"
        elif tolerates:
            yield pod.place, "tolerates the taint of GPU nodes and has no GPU"


def probes_are_three(overlay: Overlay) -> Said:
    """startup, readiness and liveness, at ports that the container has and paths that answer there."""
    for pod in overlay.pods:
        container = pod.spec["containers"][0]
        for kind in GATEWAY_ROUTES if pod.is_service else ():
            probe = container.get(kind)
            if probe is None:
                yield pod.place, f"container {container['name']} has no {kind}"
            elif "httpGet" in probe:
                yield from ((pod.place, said) for said in _wrong_route(overlay, pod, kind, probe["httpGet"]))


def probes_differ(overlay: Overlay) -> Said:
    """Readiness leaves quickly; liveness kills slowly, and never for what readiness asks."""
    for pod in overlay.pods:
        container = pod.spec["containers"][0]
        ready, live = container.get("readinessProbe"), container.get("livenessProbe")
        if not pod.is_service or ready is None or live is None:
            continue
        asked = [(probe.get("httpGet") or {}).get("path") for probe in (ready, live)]
        if asked[0] is not None and asked[0] == asked[1]:
            yield pod.place, f"readiness and liveness both ask {asked[0]}: a pod that drains or loads would be killed"
        if _patience(live) < SLOW_TO_KILL_S:
            yield pod.place, f"the livenessProbe kills after {_patience(live):g} s; give it {SLOW_TO_KILL_S:g}"
        if _patience(ready) > QUICK_TO_LEAVE_S:
            yield pod.place, f"the readinessProbe takes {_patience(ready):g} s to say no; at most {QUICK_TO_LEAVE_S:g}"


def gpus(container: dict[str, Any]) -> int:
    return int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))


def _unconfined(pod: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    if own.get("privileged"):
        yield "is privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if not own.get("runAsUser", pod.get("runAsUser")):
        yield "runAsUser is no uid above 0: an image whose user is a name cannot be proved not to be root's"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
        yield "does not drop ALL capabilities"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile is not RuntimeDefault"


def _patience(probe: dict[str, Any]) -> float:
    return float(probe.get("periodSeconds", 10)) * float(probe.get("failureThreshold", 3))


def _wrong_route(overlay: Overlay, pod: Pod, kind: str, asked: dict[str, Any]) -> Iterator[str]:
    port, path = pod.port(asked["port"]), asked.get("path", "/")
    if port is None:
        yield f"{kind} asks the port {asked['port']!r}, which the container does not have"
        return
    routes: dict[int, tuple[str, ...]] = {}
    if overlay.options is not None and pod in overlay.gateways:
        routes[overlay.options.gateway.port] = GATEWAY_ROUTES[kind]
    for flag, paths in RAY_ROUTES.items():
        if flag in pod.ray_params:
            routes[int(pod.ray_params[flag])] = paths
    if pod.is_ray:
        routes[pod.port("serve") or 8000] = (SERVE_PROXY_ROUTE,)
    if port not in routes:
        yield f"{kind} asks port {port}, where nothing that is known listens"
    elif path not in routes[port]:
        yield f"{kind} asks {path} at port {port}; what answers it there is {' or '.join(routes[port])}"


RULES = (
    pods_are_confined,
    root_is_read_only,
    service_accounts_give_nothing,
    resources_are_bounded,
    volumes_are_bounded,
    shared_memory_is_mounted,
    images_are_pinned,
    gpus_are_scheduled,
    probes_are_three,
    probes_differ,
)
