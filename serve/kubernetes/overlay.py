"""A built overlay as its rules look at it: objects by kind, every pod template, and the application's config file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import yaml

from serve.config import parse_config
from serve.errors import ConfigError
from serve.kubernetes.kustomize import Manifest, identity
from serve.options import ServeOptions

CONFIG_MOUNT = "/etc/tandem/config"
CONFIG_PATH = CONFIG_MOUNT + "/config.yaml"


@dataclass(frozen=True)
class Finding:
    """Something that a rule says of an object. `to set`: right as an example, and the user's to fill in."""

    rule: str
    where: str
    message: str
    level: Literal["error", "to set"] = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class Pod:
    """A pod template and who makes pods of it."""

    owner: Manifest
    place: str
    """Of the template, for messages: `RayService/tandem group models`."""
    template: dict[str, Any]
    least: int
    most: int
    """How many there may be, at least and at most."""
    group: dict[str, Any] = field(default_factory=dict)
    """The Ray group it belongs to, if it is one of Ray's."""

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.template.get("spec", {})
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template.get("metadata", {}).get("labels", {})
        return labels

    @property
    def role(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]

    @property
    def ray_params(self) -> dict[str, str]:
        params: dict[str, str] = self.group.get("rayStartParams", {})
        return params

    @property
    def is_ray(self) -> bool:
        return bool(self.group)

    @property
    def is_service(self) -> bool:
        """Runs until it is told to end."""
        return self.owner["kind"] != "Job"

    def port(self, name: str | int) -> int | None:
        """The number of a container port, given its name or its number."""
        ports = [port for container in self.containers for port in container.get("ports", ())]
        if isinstance(name, int):
            return name if any(port["containerPort"] == name for port in ports) else None
        return next((port["containerPort"] for port in ports if port.get("name") == name), None)

    def volume_at(self, path: str) -> dict[str, Any] | None:
        """The volume in which `path` lies, of the first container."""
        mounts = self.spec["containers"][0].get("volumeMounts", ())
        holding = [m for m in mounts if path == m["mountPath"] or path.startswith(m["mountPath"].rstrip("/") + "/")]
        if not holding:
            return None
        name = max(holding, key=lambda mount: len(mount["mountPath"]))["name"]
        return next((volume for volume in self.spec.get("volumes", ()) if volume["name"] == name), None)


class Overlay:
    """What `kubectl apply -k` would send. `external`: names (`Secret/x`) of what the user makes by other means."""

    def __init__(self, name: str, objects: list[Manifest], external: Iterable[str] = ()) -> None:
        self.name = name
        self.objects = objects
        self.external = frozenset(external)

    def of(self, *kinds: str) -> Iterator[Manifest]:
        return (manifest for manifest in self.objects if manifest["kind"] in kinds)

    def get(self, kind: str, name: str) -> Manifest | None:
        return next((manifest for manifest in self.of(kind) if manifest["metadata"]["name"] == name), None)

    @cached_property
    def pods(self) -> list[Pod]:
        return [pod for manifest in self.objects for pod in _pods(manifest)]

    @cached_property
    def gateways(self) -> list[Pod]:
        """The pods in which gateways listen."""
        return [pod for pod in self.pods if pod.role in ("gateway", "server")]

    def variable(self, pod: Pod, name: str) -> str:
        """The value of an environment variable of the pod's first container, read from its ConfigMap; else empty."""
        for variable in pod.spec["containers"][0].get("env", ()):
            if variable["name"] == name:
                source = variable.get("valueFrom", {}).get("configMapKeyRef")
                held = (self.get("ConfigMap", source["name"]) or {}) if source else {}
                return str(held.get("data", {}).get(source["key"], "") if source else variable.get("value", ""))
        return ""

    @cached_property
    def config_text(self) -> str | None:
        for manifest in self.of("ConfigMap"):
            if "config.yaml" in manifest.get("data", {}):
                return str(manifest["data"]["config.yaml"])
        return None

    @cached_property
    def config(self) -> ServeOptions | str | None:
        """The application's options, or what is wrong with them; None without a config file."""
        if self.config_text is None:
            return None
        try:
            return parse_config(yaml.safe_load(self.config_text), origin="config.yaml")
        except (ConfigError, yaml.YAMLError) as error:
            return str(error)

    @property
    def options(self) -> ServeOptions | None:
        return self.config if isinstance(self.config, ServeOptions) else None


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' label selector; an empty one matches everything."""
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for rule in selector.get("matchExpressions", ()):
        held, values = labels.get(rule["key"]), rule.get("values", [])
        fits = {
            "In": held in values,
            "NotIn": held not in values,
            "Exists": held is not None,
            "DoesNotExist": held is None,
        }
        if not fits.get(rule["operator"], False):
            return False
    return True


_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def quantity(text: str | float | None) -> float | None:
    """`500m`, `4Gi`: Kubernetes' amounts as a number; None for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|Ki|M|Mi|G|Gi|T|Ti)?", str(text))
    return float(found[1]) * _UNITS[found[2] or ""] if found else None


def _pods(manifest: Manifest) -> Iterator[Pod]:
    name, spec = identity(manifest), manifest.get("spec", {})
    if manifest["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        yield Pod(manifest, f"{name} head", cluster["headGroupSpec"]["template"], 1, 1, cluster["headGroupSpec"])
        for group in cluster.get("workerGroupSpecs", ()):
            least, most = group.get("minReplicas", 0), group.get("maxReplicas", group.get("replicas", 0))
            if not cluster.get("enableInTreeAutoscaling"):
                least = most = group.get("replicas", 0)
            yield Pod(manifest, f"{name} group {group['groupName']}", group["template"], least, most, group)
    elif manifest["kind"] in ("Deployment", "StatefulSet", "DaemonSet"):
        count = spec.get("replicas", 1)
        yield Pod(manifest, name, spec["template"], count, count)
    elif manifest["kind"] == "Job":
        yield Pod(manifest, name, spec["template"], 0, 1)
