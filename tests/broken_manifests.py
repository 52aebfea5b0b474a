"""Manifests with one thing wrong in each, made of good ones, and what the check must say of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from serve.kubernetes.kustomize import build, identity

K8S = Path(__file__).resolve().parent.parent / "k8s"
OVERLAYS = tuple(sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml")))
GONE = object()

CLUSTER = "spec/rayClusterConfig"
HEAD = f"{CLUSTER}/headGroupSpec"
GATEWAY = f"{CLUSTER}/workerGroupSpecs/0"
MODELS = f"{CLUSTER}/workerGroupSpecs/1"
RAY = "RayService/tandem"
POD = "template/spec"
FIRST = f"{POD}/containers/0"


@cache
def good(overlay: str) -> list[dict[str, Any]]:
    return build(K8S / "overlays" / overlay)


@dataclass(frozen=True)
class Broken:
    """An overlay and what is done to it; the rule that must find it, and words that it must say."""

    what: str
    overlay: str
    change: Callable[[list[dict[str, Any]]], None]
    rule: str
    says: str

    def objects(self) -> list[dict[str, Any]]:
        objects = copy.deepcopy(good(self.overlay))
        self.change(objects)
        return objects


def put(name: str, path: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Set, or with GONE delete, what is at `path` of the object `name`; at the end of a list: `-`."""

    def change(objects: list[dict[str, Any]]) -> None:
        node: Any = next(manifest for manifest in objects if identity(manifest).startswith(name))
        *parents, last = path.split("/")
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part.replace("~", "/")]
        if isinstance(node, list):
            if last == "-":
                node.append(value)
            elif value is GONE:
                del node[int(last)]
            else:
                node[int(last)] = value
        elif value is GONE:
            del node[last.replace("~", "/")]
        else:
            node[last.replace("~", "/")] = value

    return change


def drop(name: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(objects: list[dict[str, Any]]) -> None:
        objects[:] = [manifest for manifest in objects if identity(manifest) != name]

    return change


def configure(path: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Change the config file in the ConfigMap."""

    def change(objects: list[dict[str, Any]]) -> None:
        manifest = next(manifest for manifest in objects if identity(manifest).startswith("ConfigMap/tandem-config"))
        config = yaml.safe_load(manifest["data"]["config.yaml"])
        put("X", path, value)([{"kind": "X", "metadata": {"name": ""}, **config}])
        node: Any = config
        *parents, last = path.split("/")
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if value is GONE:
            node.pop(last, None)
        else:
            node[last] = value
        manifest["data"]["config.yaml"] = yaml.safe_dump(config)

    return change


def serve(old: str, new: str) -> Callable[[list[dict[str, Any]]], None]:
    """Change serveConfigV2."""

    def change(objects: list[dict[str, Any]]) -> None:
        manifest = next(manifest for manifest in objects if manifest["kind"] == "RayService")
        assert old in manifest["spec"]["serveConfigV2"]
        manifest["spec"]["serveConfigV2"] = manifest["spec"]["serveConfigV2"].replace(old, new)

    return change


def rename(old: str, new: str) -> Callable[[list[dict[str, Any]]], None]:
    return put(old, "metadata/name", new)


CASES = [
    # -- shapes
    Broken("unknown field of a Service", "cpu-dev", put("Service/", "spec/portz", []), "kubernetes-schema", "'portz'"),
    Broken("a port as text", "cpu-dev", put("Service/", "spec/ports/0/port", "80"), "kubernetes-schema", "'80'"),
    Broken("an unknown kind", "cpu-dev", put("Service/", "kind", "Servise"), "kubernetes-schema", "neither Kubernetes"),
    Broken(
        "an old version of a CRD", "cpu-dev", put(RAY, "apiVersion", "ray.io/v1alpha1"), "custom-resource", "deprecated"
    ),
    Broken(
        "a typo in a pod of a CRD",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/livenesProbe", {}),
        "custom-resource",
        "livenesProbe",
    ),
    Broken(
        "a value out of a CRD's list",
        "cpu-dev",
        put(RAY, f"{CLUSTER}/authOptions/mode", "tokn"),
        "custom-resource",
        "tokn",
    ),
    Broken(
        "a required field left out", "cpu-dev", put(RAY, f"{GATEWAY}/groupName", GONE), "custom-resource", "groupName"
    ),
    Broken(
        "a CEL rule of the Gateway API",
        "production",
        put("HTTPRoute/tandem", "spec/rules/0/timeouts", {"request": "5s", "backendRequest": "9s"}),
        "custom-resource",
        "backendRequest timeout cannot be longer than request timeout",
    ),
    Broken(
        "a CEL rule on two parents",
        "production",
        put("HTTPRoute/tandem", "spec/parentRefs/-", {"name": "tandem"}),
        "custom-resource",
        "sectionName",
    ),
    # -- names and references
    Broken("a name in capitals", "cpu-dev", rename("PodDisruptionBudget/", "Tandem"), "names-are-valid", "'Tandem'"),
    Broken("a RayService's long name", "cpu-dev", rename(RAY, "t" * 48), "names-are-valid", "at most 47"),
    Broken(
        "a label that is none",
        "cpu-dev",
        put(RAY, f"{MODELS}/template/metadata/labels/x", "a b"),
        "labels-are-valid",
        "x=a b",
    ),
    Broken("two namespaces", "cpu-dev", put("Service/", "metadata/namespace", "other"), "one-namespace", "'other'"),
    Broken(
        "a ConfigMap that is not there", "cpu-dev", rename("ConfigMap/", "other"), "references-exist", "tandem-config-"
    ),
    Broken(
        "an account that is not there",
        "cpu-dev",
        drop("ServiceAccount/tandem"),
        "references-exist",
        "ServiceAccount 'tandem'",
    ),
    Broken(
        "a claim that is not there",
        "single-gpu",
        drop("PersistentVolumeClaim/tandem-models"),
        "references-exist",
        "tandem-models",
    ),
    Broken(
        "a mount without its volume",
        "cpu-dev",
        put(RAY, f"{HEAD}/{POD}/volumes/1", GONE),
        "mounts-have-volumes",
        "'tmp'",
    ),
    Broken(
        "a volume without its mount",
        "cpu-dev",
        put(RAY, f"{HEAD}/{POD}/volumes/-", {"name": "x", "emptyDir": {"sizeLimit": "1Gi"}}),
        "mounts-have-volumes",
        "no container mounts",
    ),
    Broken(
        "a Service that selects nothing",
        "cpu-dev",
        put("Service/", "spec/selector", {"app.kubernetes.io/component": "gatway"}),
        "services-lead-to-pods",
        "selects no pod",
    ),
    Broken(
        "a Service to a missing port",
        "cpu-dev",
        put("Service/", "spec/ports/0/targetPort", "web"),
        "services-lead-to-pods",
        "'web'",
    ),
    Broken(
        "a budget for nobody",
        "cpu-dev",
        put("PodDisruptionBudget/", "spec/selector/matchLabels", {"app": "x"}),
        "selectors-find-pods",
        "finds no pod",
    ),
    Broken(
        "a Deployment that does not find its pods",
        "no-ray",
        put("Deployment/", "spec/selector/matchLabels", {"app": "x"}),
        "selectors-find-pods",
        "its own pods",
    ),
    Broken(
        "a route to no port",
        "production",
        put("HTTPRoute/tandem", "spec/rules/0/backendRefs/0/port", 81),
        "routes-lead-to-services",
        ":81",
    ),
    Broken(
        "a route to no listener",
        "production",
        put("HTTPRoute/tandem", "spec/parentRefs/0/sectionName", "tls"),
        "routes-lead-to-services",
        "'tls'",
    ),
    Broken(
        "a route of another host",
        "production",
        put("HTTPRoute/tandem", "spec/hostnames", ["x.org"]),
        "routes-lead-to-services",
        "'x.org'",
    ),
    Broken(
        "a monitor of nothing",
        "production",
        put("ServiceMonitor/", "spec/selector/matchLabels", {"app": "x"}),
        "monitors-find-services",
        "finds no Service",
    ),
    # -- pods
    Broken(
        "a root container",
        "cpu-dev",
        put(RAY, f"{HEAD}/{POD}/securityContext/runAsUser", 0),
        "pods-are-confined",
        "uid above 0",
    ),
    Broken(
        "kept capabilities",
        "cpu-dev",
        put(RAY, f"{MODELS}/{FIRST}/securityContext/capabilities", {}),
        "pods-are-confined",
        "drop ALL",
    ),
    Broken(
        "no seccomp",
        "cpu-dev",
        put(RAY, f"{MODELS}/{POD}/securityContext/seccompProfile", GONE),
        "pods-are-confined",
        "seccomp",
    ),
    Broken(
        "escalation",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/securityContext/allowPrivilegeEscalation", True),
        "pods-are-confined",
        "Escalation",
    ),
    Broken(
        "the host's network",
        "cpu-dev",
        put(RAY, f"{MODELS}/{POD}/hostNetwork", True),
        "pods-are-confined",
        "hostNetwork",
    ),
    Broken(
        "a writable root without a GPU",
        "cpu-dev",
        put(RAY, f"{GATEWAY}/{FIRST}/securityContext/readOnlyRootFilesystem", False),
        "root-is-read-only",
        "has no GPU",
    ),
    Broken(
        "nowhere to write", "cpu-dev", put(RAY, f"{GATEWAY}/{FIRST}/volumeMounts/2", GONE), "root-is-read-only", "/tmp"
    ),
    Broken(
        "a token of Kubernetes in a pod",
        "cpu-dev",
        put(RAY, f"{GATEWAY}/{POD}/automountServiceAccountToken", True),
        "service-accounts-give-nothing",
        "nothing here speaks",
    ),
    Broken(
        "an autoscaler without a token",
        "production",
        put(RAY, f"{HEAD}/{POD}/automountServiceAccountToken", False),
        "service-accounts-give-nothing",
        "needs the token",
    ),
    Broken(
        "no memory limit",
        "cpu-dev",
        put(RAY, f"{MODELS}/{FIRST}/resources/limits/memory", GONE),
        "resources-are-bounded",
        "no limit",
    ),
    Broken(
        "requests above limits",
        "cpu-dev",
        put(RAY, f"{MODELS}/{FIRST}/resources/requests/cpu", "5"),
        "resources-are-bounded",
        "than its limit",
    ),
    Broken(
        "fewer GPUs asked for than limited",
        "multi-gpu-tp",
        put(RAY, f"{MODELS}/{FIRST}/resources/requests/nvidia.com~gpu", "1"),
        "resources-are-bounded",
        "differently",
    ),
    Broken(
        "an emptyDir without an end",
        "cpu-dev",
        put(RAY, f"{HEAD}/{POD}/volumes/1/emptyDir", {}),
        "volumes-are-bounded",
        "no sizeLimit",
    ),
    Broken(
        "shared memory that eats the limit",
        "cpu-dev",
        put(RAY, f"{HEAD}/{POD}/volumes/3/emptyDir/sizeLimit", "4Gi"),
        "volumes-are-bounded",
        "4 GiB",
    ),
    Broken(
        "no /dev/shm",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/volumeMounts/3/mountPath", "/shm"),
        "shared-memory-is-mounted",
        "/dev/shm",
    ),
    Broken(
        "an object store that does not fit",
        "cpu-dev",
        put(RAY, f"{HEAD}/rayStartParams/object-store-memory", "1073741824"),
        "shared-memory-is-mounted",
        "1024 MiB",
    ),
    Broken(
        "an image called latest",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/image", "tandem:latest"),
        "images-are-pinned",
        "latest",
    ),
    Broken(
        "an image without a tag",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/image", "tandem"),
        "images-are-pinned",
        "'tandem'",
    ),
    Broken(
        "half a digest",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/image", "tandem@sha256:12ab"),
        "images-are-pinned",
        "64 hex",
    ),
    Broken(
        "a GPU pod that no GPU node takes",
        "single-gpu",
        put(RAY, f"{MODELS}/{POD}/tolerations", GONE),
        "gpus-are-scheduled",
        "taint",
    ),
    Broken(
        "a GPU pod for any node",
        "single-gpu",
        put(RAY, f"{MODELS}/{POD}/nodeSelector", GONE),
        "gpus-are-scheduled",
        "nodeSelector",
    ),
    Broken(
        "no startup probe",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/startupProbe", GONE),
        "probes-are-three",
        "no startupProbe",
    ),
    Broken(
        "a probe of a route that is none",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/readinessProbe/httpGet/path", "/ready"),
        "probes-are-three",
        "/ready at port 8100",
    ),
    Broken(
        "a liveness probe that asks for readiness",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/livenessProbe/httpGet/path", "/readyz"),
        "probes-differ",
        "both ask /readyz",
    ),
    Broken(
        "a hasty liveness probe",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/livenessProbe/failureThreshold", 1),
        "probes-differ",
        "after 10 s",
    ),
    Broken(
        "a slow readiness probe",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/readinessProbe/periodSeconds", 30),
        "probes-differ",
        "60 s to say no",
    ),
    # -- the config file
    Broken(
        "no config file", "no-ray", put("ConfigMap/", "data", {"config.yml": ""}), "config-is-valid", "no ConfigMap"
    ),
    Broken(
        "a typo in the config file",
        "cpu-dev",
        configure("gateway/drain_timeout", 5),
        "config-is-valid",
        "did you mean 'drain_timeout_s'",
    ),
    Broken(
        "a config file mounted elsewhere",
        "cpu-dev",
        put(RAY, f"{MODELS}/{FIRST}/volumeMounts/0/mountPath", "/etc/tandem"),
        "config-is-mounted",
        "/etc/tandem/config",
    ),
    Broken(
        "a command without the config",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/args", ["serve"]),
        "config-is-mounted",
        "--config",
    ),
    Broken(
        "a gateway on loopback",
        "cpu-dev",
        configure("gateway/host", "127.0.0.1"),
        "gateway-listens-where-its-pods-say",
        "0.0.0.0",
    ),
    Broken(
        "a gateway at another port",
        "cpu-dev",
        configure("gateway/port", 8101),
        "gateway-listens-where-its-pods-say",
        "8101",
    ),
    Broken(
        "channels at any port",
        "cpu-dev",
        configure("gateway/channel_ports", GONE),
        "gateway-listens-where-its-pods-say",
        "channel_ports",
    ),
    Broken(
        "keys in the ConfigMap",
        "cpu-dev",
        configure("gateway/api_key", ["k"]),
        "keys-are-mounted",
        "stands in a ConfigMap",
    ),
    Broken(
        "an open server",
        "cpu-dev",
        configure("gateway/allow_unauthenticated", True),
        "keys-are-mounted",
        "allow_unauthenticated",
    ),
    Broken(
        "keys where none are mounted",
        "cpu-dev",
        configure("gateway/api_key_file", "/keys"),
        "keys-are-mounted",
        "(/keys)",
    ),
    Broken(
        "weights on a hub",
        "single-gpu",
        configure("models/0/model", "Qwen/Qwen3-0.6B"),
        "weights-are-where-the-config-says",
        "cannot reach",
    ),
    Broken(
        "weights that nothing fills",
        "single-gpu",
        configure("models/0/model", "/models/x"),
        "weights-are-where-the-config-says",
        "fills",
    ),
    Broken(
        "writable weights",
        "no-ray",
        put("Deployment/", f"spec/{POD}/volumes/5/persistentVolumeClaim/readOnly", False),
        "weights-are-where-the-config-says",
        "writable",
    ),
    Broken(
        "a moving revision",
        "no-ray",
        put("ConfigMap/tandem-model", "data/REVISION", "main"),
        "downloads-are-pinned",
        "'main'",
    ),
    Broken(
        "GPUs that no model uses",
        "single-gpu",
        configure("models/0/device", "cpu"),
        "devices-are-the-configs",
        "no model",
    ),
    Broken(
        "a model without its GPU",
        "cpu-dev",
        configure("models/0/device", "cuda"),
        "devices-are-the-configs",
        "has no GPU",
    ),
    # -- Ray
    Broken(
        "Ray without a token", "cpu-dev", put(RAY, f"{CLUSTER}/authOptions", GONE), "ray-asks-for-a-token", "not token"
    ),
    Broken("an old Ray", "cpu-dev", put(RAY, f"{CLUSTER}/rayVersion", "2.46.0"), "ray-asks-for-a-token", "2.56"),
    Broken(
        "two groups of a name",
        "cpu-dev",
        put(RAY, f"{MODELS}/groupName", "gateway"),
        "operator-accepts-the-cluster",
        "same name",
    ),
    Broken(
        "replicas out of bounds",
        "cpu-dev",
        put(RAY, f"{MODELS}/replicas", 3),
        "operator-accepts-the-cluster",
        "from 1 to 1",
    ),
    Broken(
        "resources said twice",
        "cpu-dev",
        put(RAY, f"{GATEWAY}/rayStartParams/num-cpus", "0"),
        "operator-accepts-the-cluster",
        "use one of them",
    ),
    Broken(
        "a variable that is KubeRay's",
        "cpu-dev",
        put(RAY, f"{HEAD}/{FIRST}/env/-", {"name": "RAY_AUTH_TOKEN", "value": "x"}),
        "operator-accepts-the-cluster",
        "RAY_AUTH_TOKEN",
    ),
    Broken(
        "an upgrade without its options",
        "cpu-dev",
        put(RAY, "spec/upgradeStrategy/type", "NewClusterWithIncrementalUpgrade"),
        "operator-accepts-the-cluster",
        "clusterUpgradeOptions",
    ),
    Broken(
        "a flag that ray start has not",
        "cpu-dev",
        put(RAY, f"{HEAD}/rayStartParams/dashbord-host", "x"),
        "ray-start-takes-the-flags",
        "dashbord",
    ),
    Broken(
        "a free port",
        "cpu-dev",
        put(RAY, f"{MODELS}/rayStartParams/node-manager-port", GONE),
        "ray-start-takes-the-flags",
        "free port",
    ),
    Broken(
        "two at one port",
        "cpu-dev",
        put(RAY, f"{HEAD}/rayStartParams/node-manager-port", "8076"),
        "ports-do-not-collide",
        "8076",
    ),
    Broken(
        "the gateway at Serve's port", "cpu-dev", configure("gateway/port", 8000), "ports-do-not-collide", "the gateway"
    ),
    Broken("a head that works", "cpu-dev", put(RAY, f"{HEAD}/resources", GONE), "head-does-not-work", "offers CPUs"),
    Broken(
        "a Serve config that is no YAML",
        "cpu-dev",
        serve("applications:", "applications: ["),
        "serve-config-is-rays",
        "not YAML",
    ),
    Broken(
        "a key that Serve ignores",
        "cpu-dev",
        serve("proxy_location", "proxy_locatoin"),
        "serve-config-is-rays",
        "proxy_locatoin",
    ),
    Broken(
        "a builder that is not there",
        "cpu-dev",
        serve("app:build", "app:bild"),
        "serve-config-is-rays",
        "leads nowhere",
    ),
    Broken(
        "a number out of Serve's bounds",
        "cpu-dev",
        serve("num_cpus: 0\n", "num_cpus: -1\n"),
        "serve-config-is-rays",
        "num_cpus",
    ),
    Broken("another config file", "cpu-dev", serve("config/config.yaml", "c.yaml"), "serve-config-is-ours", "c.yaml"),
    Broken(
        "a deployment that is not there", "cpu-dev", serve("name: hub", "name: hubb"), "serve-config-is-ours", "'hubb'"
    ),
    Broken(
        "a resource that no pod has",
        "cpu-dev",
        serve("{tandem_gateway: 1}", "{gatway: 1}"),
        "serve-config-is-ours",
        "'gatway'",
    ),
    Broken(
        "more gateways than pods",
        "cpu-dev",
        configure("gateway/num_gateways", 3),
        "gateways-have-pods",
        "num_gateways is 3",
    ),
    Broken(
        "gateway pods that take models",
        "cpu-dev",
        put(RAY, f"{GATEWAY}/resources/CPU", "2"),
        "gateways-have-pods",
        "offers CPUs",
    ),
    Broken(
        "more ranks than GPUs",
        "multi-gpu-tp",
        configure("models/0/tensor_parallel_size", 8),
        "models-have-pods",
        "want 8 GPUs",
    ),
    Broken(
        "GPUs without a rank",
        "multi-gpu-tp",
        configure("models/0/tensor_parallel_size", 3),
        "models-have-pods",
        "without use",
    ),
    Broken(
        "pods without a replica",
        "multi-node",
        configure("models/0/pipeline_parallel_size", 1),
        "models-have-pods",
        "2 pods have 16 GPUs",
    ),
    Broken(
        "pods that grow without an autoscaler",
        "cpu-dev",
        put(RAY, f"{MODELS}/maxReplicas", 4),
        "autoscaling-has-an-autoscaler",
        "enableInTreeAutoscaling",
    ),
    Broken(
        "an autoscaler without demand",
        "production",
        configure("models/0/autoscaling_config", GONE),
        "autoscaling-has-an-autoscaler",
        "no model has an autoscaling_config",
    ),
    # -- drains, budgets, scalers
    Broken(
        "no preStop",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/lifecycle", GONE),
        "drain-fits-the-grace-period",
        "no preStop",
    ),
    Broken(
        "a grace period that is too short",
        "no-ray",
        put("Deployment/", f"spec/{POD}/terminationGracePeriodSeconds", 60),
        "drain-fits-the-grace-period",
        "preStop 15 + drain_timeout_s 60 + closing 10 is 85",
    ),
    Broken(
        "a longer drain",
        "cpu-dev",
        configure("gateway/drain_timeout_s", 300),
        "drain-fits-the-grace-period",
        "may take 310 s",
    ),
    Broken(
        "a preStop of another kind",
        "cpu-dev",
        put(RAY, f"{GATEWAY}/{FIRST}/lifecycle/preStop/exec/command", ["sleep", "5"]),
        "drain-fits-the-grace-period",
        "neither a sleep",
    ),
    Broken(
        "a preStop that is over too soon",
        "no-ray",
        put("Deployment/", f"spec/{FIRST}/lifecycle/preStop/sleep/seconds", 1),
        "unready-before-the-end",
        "sleeps 1 s",
    ),
    Broken(
        "an old cluster that is deleted too soon",
        "cpu-dev",
        put(RAY, "spec/rayClusterDeletionDelaySeconds", 10),
        "old-cluster-outlives-its-drain",
        "10, below",
    ),
    Broken(
        "a budget that blocks every drain",
        "cpu-dev",
        put("PodDisruptionBudget/", "spec/minAvailable", 2),
        "budgets-leave-room",
        "no node",
    ),
    Broken(
        "a budget in shares",
        "cpu-dev",
        put("PodDisruptionBudget/", "spec/minAvailable", "50%"),
        "budgets-leave-room",
        "whole number",
    ),
    Broken(
        "no budget",
        "cpu-dev",
        drop("PodDisruptionBudget/tandem-gateway"),
        "gateways-have-a-budget",
        "no PodDisruptionBudget",
    ),
    Broken(
        "gateways on one node",
        "cpu-dev",
        put(RAY, f"{GATEWAY}/{POD}/topologySpreadConstraints", []),
        "gateways-are-spread",
        "topologySpreadConstraint",
    ),
    Broken(
        "a scaler of Ray",
        "no-ray",
        put("ScaledObject/", "spec/scaleTargetRef", {"kind": "RayService", "name": "tandem"}),
        "scalers-have-targets",
        "no scale subresource",
    ),
    Broken(
        "a scaler of nothing",
        "no-ray",
        put("ScaledObject/", "spec/scaleTargetRef/name", "x"),
        "scalers-have-targets",
        "Deployment/x",
    ),
    Broken(
        "two who count replicas",
        "no-ray",
        put("Deployment/", "spec/replicas", 2),
        "replicas-have-one-owner",
        "sets replicas",
    ),
    Broken(
        "a metric that is not there",
        "no-ray",
        put("ScaledObject/", "spec/triggers/0/metadata/query", "sum(tandem_queue)"),
        "scalers-ask-for-real-metrics",
        "'tandem_queue'",
    ),
    Broken(
        "every gateway scraped",
        "production",
        put("ServiceMonitor/", "spec/endpoints/0/relabelings", []),
        "monitors-scrape-once",
        "several times",
    ),
    # -- connections
    Broken(
        "no policy", "cpu-dev", lambda objects: _without_policies(objects), "pods-are-isolated", "everything is open"
    ),
    Broken(
        "a policy that forgets the channel",
        "cpu-dev",
        put("NetworkPolicy/tandem-ray-models", "spec/ingress", []),
        "needed-connections-pass",
        "gateway through to port 7000-7099 (the channel)",
    ),
    Broken(
        "a channel at other ports than the policy's",
        "cpu-dev",
        configure("gateway/channel_ports", "7050-7150"),
        "needed-connections-pass",
        "7100-7150",
    ),
    Broken(
        "a port of Ray's that the policy does not know",
        "cpu-dev",
        put(RAY, f"{MODELS}/rayStartParams/object-manager-port", "8099"),
        "needed-connections-pass",
        "8099",
    ),
    Broken(
        "ranks that cannot meet",
        "multi-node",
        drop("NetworkPolicy/tandem-ranks"),
        "needed-connections-pass",
        "ranks of one model",
    ),
    Broken(
        "more ports than are used",
        "cpu-dev",
        lambda objects: _open_wide(objects),
        "nothing-else-passes",
        "10001, which nothing needs",
    ),
    Broken(
        "the dashboard for everybody",
        "cpu-dev",
        put("NetworkPolicy/tandem-ray-head", "spec/ingress/-", {"ports": [{"protocol": "TCP", "port": 8265}]}),
        "strangers-reach-only-the-gateway",
        "8265",
    ),
    Broken("nobody let in", "cpu-dev", drop("NetworkPolicy/tandem-gateway"), "clients-reach-the-gateway", "8100"),
    Broken(
        "a download that cannot reach the hub",
        "single-gpu",
        drop("NetworkPolicy/tandem-download"),
        "pods-reach-only-what-they-need",
        "443, which it needs",
    ),
    Broken(
        "models on the internet",
        "cpu-dev",
        put("NetworkPolicy/tandem-ray-models", "spec/egress/-", {"ports": [{"protocol": "TCP", "port": 443}]}),
        "pods-reach-only-what-they-need",
        "lets it out to port 443",
    ),
    Broken("no names", "cpu-dev", drop("NetworkPolicy/tandem-dns"), "pods-reach-only-what-they-need", "ask for names"),
]


def _without_policies(objects: list[dict[str, Any]]) -> None:
    objects[:] = [manifest for manifest in objects if manifest["kind"] != "NetworkPolicy"]


def _open_wide(objects: list[dict[str, Any]]) -> None:
    """Both sides must let a connection through."""
    port = {"protocol": "TCP", "port": 10001}
    for side in ("ingress", "egress"):
        put("NetworkPolicy/tandem-ray", f"spec/{side}/0/ports/-", port)(objects)
