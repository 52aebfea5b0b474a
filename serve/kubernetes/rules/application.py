"""Tandem's config file in its pods: it is valid, its socket is theirs, its keys and its weights are where it says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from models.source import embedded_names
from serve.gateway.auth import LOOPBACK_NAMES
from serve.kubernetes.kustomize import identity, split_image
from serve.kubernetes.overlay import CONFIG_MOUNT, CONFIG_PATH, Overlay
from serve.kubernetes.rules.pods import gpus

Said = Iterator[tuple[str, str]]

EXAMPLE = re.compile(r"(?:[a-z0-9.-]+\.)?example\.com(?:/\S+)?")


def config_is_valid(overlay: Overlay) -> Said:
    if overlay.config is None and overlay.gateways:
        yield overlay.name, "no ConfigMap holds a config.yaml: nothing says which models to serve"
    elif isinstance(overlay.config, str):
        yield "config.yaml", overlay.config.removeprefix("config.yaml: ")


def config_is_mounted(overlay: Overlay) -> Said:
    """In every pod that may read it: on Ray that is any, for Serve builds the application wherever it likes."""
    holders = {m["metadata"]["name"] for m in overlay.of("ConfigMap") if "config.yaml" in m.get("data", {})}
    for pod in overlay.pods:
        if not (pod.is_ray or pod.role == "server"):
            continue
        volume = pod.volume_at(CONFIG_PATH)
        paths = {mount["mountPath"] for mount in pod.spec["containers"][0].get("volumeMounts", ())}
        if volume is None or volume.get("configMap", {}).get("name") not in holders or CONFIG_MOUNT not in paths:
            yield pod.place, f"the ConfigMap with config.yaml is not mounted at {CONFIG_MOUNT}"
        command = pod.spec["containers"][0].get("args", [])
        if pod.role == "server" and command[:1] == ["serve"] and CONFIG_PATH not in command:
            yield pod.place, f"is not started with --config {CONFIG_PATH}"


def gateway_listens_where_its_pods_say(overlay: Overlay) -> Said:
    if overlay.options is None:
        return
    options = overlay.options.gateway
    if options.host in LOOPBACK_NAMES:
        yield "config.yaml", f"gateway.host is {options.host!r}: nobody outside the pod would reach it; write 0.0.0.0"
    for pod in overlay.gateways:
        if pod.port("http") != options.port:
            yield pod.place, f"its port 'http' is {pod.port('http')}, and gateway.port is {options.port}"
    if any(pod.is_ray for pod in overlay.gateways) and options.channel_ports is None:
        yield "config.yaml", "gateway.channel_ports is missing: free ports cannot be let through by a NetworkPolicy"


def keys_are_mounted(overlay: Overlay) -> Said:
    """From a Secret, into the gateways' pods and no others; never in the ConfigMap."""
    if overlay.options is None:
        return
    options = overlay.options.gateway
    if options.api_key:
        yield "config.yaml", "gateway.api_key stands in a ConfigMap; put keys into the Secret and name api_key_file"
    if options.allow_unauthenticated:
        yield "config.yaml", "gateway.allow_unauthenticated is true: whoever reaches the Service uses it"
    path = options.api_key_file
    if path is None:
        yield "config.yaml", "gateway.api_key_file is missing: the gateway would refuse to listen without keys"
        return
    for pod in overlay.pods:
        volume = pod.volume_at(path)
        holds = volume is not None and "secret" in volume
        if pod in overlay.gateways and not holds:
            yield pod.place, f"no Secret is mounted where gateway.api_key_file is ({path})"
        if pod not in overlay.gateways and holds:
            yield pod.place, "has the API keys mounted and needs none"


def weights_are_where_the_config_says(overlay: Overlay) -> Said:
    """A model is embedded, or a folder of a mounted claim that a download Job fills: pods reach no hub."""
    if overlay.options is None:
        return
    folders = {overlay.variable(pod, "FOLDER") for pod in overlay.pods if pod.role == "download"}
    for model in overlay.options.models:
        if model.model in embedded_names() or model.load_format == "dummy":
            continue
        if not model.model.startswith("/"):
            yield (
                "config.yaml",
                f"{model.model!r} is on a hub, which pods cannot reach; use model-cache and /models/NAME",
            )
            continue
        for pod in overlay.pods:
            if pod.role not in ("models", "server"):
                continue
            volume = pod.volume_at(model.model)
            if volume is None or "persistentVolumeClaim" not in volume:
                yield pod.place, f"no claim is mounted where {model.model!r} lies"
            elif not volume["persistentVolumeClaim"].get("readOnly"):
                yield pod.place, f"mounts the weights at {model.model!r} writable"
        if model.model.removeprefix("/models/") not in folders:
            yield "config.yaml", f"no download Job fills {model.model!r}; it fills {sorted(folders)}"


def downloads_are_pinned(overlay: Overlay) -> Said:
    for pod in overlay.pods:
        if pod.role == "download":
            revision = overlay.variable(pod, "REVISION")
            if not re.fullmatch(r"[0-9a-f]{40}", revision):
                yield pod.place, f"REVISION is {revision!r}, not a commit of 40 hex digits: a branch moves"
            if not overlay.variable(pod, "MODEL") or not overlay.variable(pod, "FOLDER"):
                yield pod.place, "MODEL or FOLDER is empty; the overlay says which"


def devices_are_the_configs(overlay: Overlay) -> Said:
    """device: cuda makes Ray reserve a GPU; without it a pod with GPUs may compute on none."""
    if overlay.options is None:
        return
    for pod in overlay.pods:
        if pod.role in ("models", "server"):
            has = any(gpus(container) for container in pod.containers)
            wants = any(model.gpus_per_rank for model in overlay.options.models)
            if has and not wants:
                yield pod.place, "has GPUs, and no model in config.yaml says device: cuda"
            if wants and not has:
                yield pod.place, "has no GPU, and a model in config.yaml says device: cuda"


def examples_are_replaced(overlay: Overlay) -> Said:
    """What only the user knows: registry, host name, class of the Gateway."""
    for manifest in overlay.of("Gateway", "HTTPRoute"):
        for name in sorted(set(_strings(manifest["spec"]))):
            if EXAMPLE.fullmatch(name):
                yield identity(manifest), f"{name} is an example; set yours in the overlay"
    images = {container["image"] for pod in overlay.pods for container in pod.containers if container.get("image")}
    for image in sorted(images):
        name, _, digest = split_image(image)
        if EXAMPLE.fullmatch(name):
            yield "images", f"{image} is an example; set your registry in the overlay's `images`"
        if "/" in name and not digest:
            yield "images", f"{image} has no digest; pin it by the one that your registry shows (`digest:` in `images`)"


def _strings(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)


RULES = (
    config_is_valid,
    config_is_mounted,
    gateway_listens_where_its_pods_say,
    keys_are_mounted,
    weights_are_where_the_config_says,
    downloads_are_pinned,
    devices_are_the_configs,
)
TO_SET = (examples_are_replaced,)
