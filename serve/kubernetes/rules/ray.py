"""The RayService: what KubeRay's operator refuses, what Ray would ignore, and that its groups can hold the application.

The operator's own checks that no schema has are in `ray-operator/controllers/ray/utils/validation.go` of KubeRay 1.7.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import yaml

from serve.deployments.serve_config import check_serve_config, deployment_names, ray_start_options
from serve.kubernetes.kustomize import identity
from serve.kubernetes.overlay import CONFIG_PATH, Overlay, Pod, quantity
from serve.kubernetes.rules.pods import gpus
from serve.options import ModelOptions

Said = Iterator[tuple[str, str]]

OLDEST = (2, 56)
"""Of Ray, in `pyproject.toml`. Token authentication needs 2.52."""
PINNED = (
    *("object-manager-port", "node-manager-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
    *("metrics-export-port", "dashboard-agent-listen-port", "min-worker-port", "max-worker-port"),
)


def ray_asks_for_a_token(overlay: Overlay) -> Said:
    for service, cluster in _clusters(overlay):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield (
                identity(service),
                "authOptions.mode is not token: whoever reaches Ray's ports runs code in the cluster",
            )
        version = str(cluster.get("rayVersion", ""))
        parts = version.split(".")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts) or (int(parts[0]), int(parts[1])) < OLDEST:
            yield identity(service), f"rayVersion is {version!r}; write the image's, at least {OLDEST[0]}.{OLDEST[1]}"


def operator_accepts_the_cluster(overlay: Overlay) -> Said:
    for service, cluster in _clusters(overlay):
        where, scales = identity(service), cluster.get("enableInTreeAutoscaling", False)
        names = [group["groupName"] for group in cluster.get("workerGroupSpecs", ())]
        if len(set(names)) != len(names):
            yield where, f"two worker groups have the same name: {names}"
        for group in cluster.get("workerGroupSpecs", ()):
            least, count, most = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
            if not least <= count <= most:
                yield where, f"group {group['groupName']}: replicas {count} is not from {least} to {most}"
        for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())]:
            yield from ((where, said) for said in _refused(group, scales, cluster))
        if cluster.get("gcsFaultToleranceOptions") and "redis-password" in cluster["headGroupSpec"]["rayStartParams"]:
            yield where, "redis-password stands in rayStartParams and in gcsFaultToleranceOptions; leave the first out"
        strategy = service["spec"].get("upgradeStrategy", {})
        if strategy.get("type") not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
            yield where, f"upgradeStrategy.type {strategy['type']!r} is none that KubeRay knows"
        if strategy.get("type") == "NewClusterWithIncrementalUpgrade" and not (
            scales and strategy.get("clusterUpgradeOptions")
        ):
            yield where, "an incremental upgrade needs enableInTreeAutoscaling and clusterUpgradeOptions"


def ray_start_takes_the_flags(overlay: Overlay) -> Said:
    """`ray start` refuses a flag it does not know; ports that are not pinned cannot be let through."""
    for pod in overlay.pods:
        for name, value in pod.ray_params.items():
            if name not in ray_start_options():
                yield pod.place, f"rayStartParams {name!r} is no flag of `ray start`"
            if not isinstance(value, str):
                yield pod.place, f"rayStartParams {name!r} is {value!r}, not a string; put it in quotes"
        if pod.is_ray:
            for name in PINNED:
                if name not in pod.ray_params:
                    yield pod.place, f"rayStartParams has no {name}: Ray takes a free port, which no policy can name"


def ports_do_not_collide(overlay: Overlay) -> Said:
    """Of one pod: Ray's, Serve's proxy's, the gateway's and the channel's."""
    for pod in overlay.pods:
        taken: dict[int, str] = {}
        for name, ports in listening(overlay, pod):
            for port in ports:
                if port in taken:
                    yield pod.place, f"port {port} is {name}'s and {taken[port]}'s"
                    break
                taken[port] = name


def head_does_not_work(overlay: Overlay) -> Said:
    for service, cluster in _clusters(overlay):
        head = cluster["headGroupSpec"]
        if head.get("resources", {}).get("CPU", head["rayStartParams"].get("num-cpus")) != "0":
            yield identity(service), 'the head offers CPUs: a replica there ends when the head does; give it CPU "0"'
        if not service["spec"].get("excludeHeadPodFromServeSvc"):
            yield identity(service), "excludeHeadPodFromServeSvc is not true"


def serve_config_is_rays(overlay: Overlay) -> Said:
    for service in overlay.of("RayService"):
        for said in check_serve_config(service["spec"].get("serveConfigV2", "")):
            yield f"{identity(service)} serveConfigV2", said


def serve_config_is_ours(overlay: Overlay) -> Said:
    """The application of the ConfigMap's file, with deployments that exist and resources that some pod has."""
    for service, cluster in _clusters(overlay):
        where = f"{identity(service)} serveConfigV2"
        config = _serve_config(service)
        if config.get("http_options", {}).get("port") not in {pod.port("serve") for pod in overlay.pods if pod.is_ray}:
            yield (
                where,
                f"Serve's proxy has port {config.get('http_options', {}).get('port')}, not the pods' port 'serve'",
            )
        for application in config.get("applications", ()):
            if application.get("args") != {"config": CONFIG_PATH}:
                yield where, f"args are {application.get('args')}; give {{config: {CONFIG_PATH}}}"
            known = deployment_names(overlay.options) if overlay.options else set()
            for deployment in application.get("deployments", ()):
                if known and deployment.get("name") not in known:
                    yield where, f"the deployment {deployment.get('name')!r} is none of {', '.join(sorted(known))}"
                wanted = deployment.get("ray_actor_options", {}).get("resources", {})
                for name in wanted:
                    if not any(name in _custom_resources(group) for group in cluster.get("workerGroupSpecs", ())):
                        yield where, f"{deployment.get('name')} wants the resource {name!r}, which no group has"


def gateways_have_pods(overlay: Overlay) -> Said:
    """A gateway to a pod: with fewer pods some would wait for ever, with more some would never be ready."""
    for pod in overlay.gateways:
        if pod.is_ray and overlay.options is not None:
            wanted = overlay.options.gateway.num_gateways
            if not pod.least <= wanted <= pod.most or pod.least != wanted:
                yield (
                    pod.place,
                    f"num_gateways is {wanted} and there are {pod.least} to {pod.most} pods; make them equal",
                )
            if pod.group.get("resources", {}).get("CPU") != "0":
                yield pod.place, 'offers CPUs, so that models may be placed there; give it CPU "0"'


def models_have_pods(overlay: Overlay) -> Said:
    """CPUs and GPUs for every replica at its most, and no GPU that no replica asks for."""
    pods = [pod for pod in overlay.pods if pod.is_ray and pod.role == "models"]
    for pod in pods if overlay.options else ():
        assert overlay.options is not None
        each, cpus = gpus_of(pod), _cpus_of(pod)
        wanted_gpus = sum(_most(model) * model.num_ranks * model.gpus_per_rank for model in overlay.options.models)
        wanted_cpus = sum(_most(model) * model.num_ranks * model.num_cpus for model in overlay.options.models)
        if wanted_gpus > pod.most * each:
            yield pod.place, f"the models want {wanted_gpus:g} GPUs, and {pod.most} pods have {pod.most * each}"
        if each and math.ceil(wanted_gpus / each) < pod.most:
            yield pod.place, f"{pod.most} pods have {pod.most * each} GPUs, and the models want {wanted_gpus:g}"
        if wanted_cpus > pod.most * cpus:
            yield pod.place, f"the models want {wanted_cpus:g} CPUs, and {pod.most} pods have {pod.most * cpus:g}"
        for model in overlay.options.models:
            fits = min(model.num_ranks * model.gpus_per_rank, each)
            if fits and each % fits:
                yield pod.place, f"{model.name}: {fits:g} GPUs a replica leave some of the {each} of a pod without use"


def autoscaling_has_an_autoscaler(overlay: Overlay) -> Said:
    """Replicas that come by demand need pods that do, and the other way round."""
    for service, cluster in _clusters(overlay):
        scales = cluster.get("enableInTreeAutoscaling", False)
        grows = any(group.get("maxReplicas", 0) > group.get("minReplicas", 0) for group in cluster["workerGroupSpecs"])
        by_demand = overlay.options is not None and any(
            m.autoscaling_config is not None for m in overlay.options.models
        )
        if grows and not scales:
            yield (
                identity(service),
                "a group has maxReplicas above minReplicas, and enableInTreeAutoscaling is not true",
            )
        if scales and not by_demand:
            yield identity(service), "enableInTreeAutoscaling is true, and no model has an autoscaling_config"
        if scales and not cluster.get("autoscalerOptions", {}).get("securityContext"):
            yield (
                identity(service),
                "autoscalerOptions has no securityContext: the container that KubeRay adds is not confined",
            )


def gpus_of(pod: Pod) -> int:
    return sum(gpus(container) for container in pod.spec["containers"])


def _clusters(overlay: Overlay) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for service in overlay.of("RayService"):
        yield service, service["spec"]["rayClusterConfig"]


def _serve_config(service: dict[str, Any]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(service["spec"].get("serveConfigV2", ""))
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _refused(group: dict[str, Any], scales: bool, cluster: dict[str, Any]) -> Iterator[str]:
    name, params = group.get("groupName", "head"), group.get("rayStartParams", {})
    spec = group["template"].get("spec", {})
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys():
        yield f"group {name}: resources stand in rayStartParams and in `resources`; use one of them"
    if "labels" in params:
        yield f"group {name}: rayStartParams.labels is not taken; use the group's labels"
    is_v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    if scales and is_v2 and spec.get("restartPolicy", "Never") != "Never":
        yield f"group {name}: the autoscaler v2 wants restartPolicy Never, or none"
    variables = {variable["name"] for variable in spec["containers"][0].get("env", ())}
    for variable in sorted(variables & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_REDIS_ADDRESS"}):
        yield f"group {name}: sets {variable}, which is KubeRay's to set"


def listening(overlay: Overlay, pod: Pod) -> Iterator[tuple[str, range]]:
    params = pod.ray_params
    names = [name for name in params if name.endswith("-port") or name == "port"]
    for name in names:
        if name not in ("min-worker-port", "max-worker-port"):
            yield name, range(int(params[name]), int(params[name]) + 1)
    if "min-worker-port" in params and "max-worker-port" in params:
        yield "Ray's workers", range(int(params["min-worker-port"]), int(params["max-worker-port"]) + 1)
    if pod.is_ray and pod.port("serve"):
        yield "Serve's proxy", range(pod.port("serve") or 0, (pod.port("serve") or 0) + 1)
    if overlay.options is None:
        return
    gateway = overlay.options.gateway
    if pod in overlay.gateways:
        yield "the gateway", range(gateway.port, gateway.port + 1)
    if gateway.channel_ports is not None and pod.role in ("gateway", "models"):
        first, _, last = gateway.channel_ports.partition("-")
        yield "the channel", range(int(first), int(last) + 1)


def _custom_resources(group: dict[str, Any]) -> set[str]:
    given = group.get("rayStartParams", {}).get("resources")
    return {*group.get("resources", {}), *(json.loads(given.strip("'\"").replace("\\", "")) if given else {})}


def _cpus_of(pod: Pod) -> float:
    given = pod.group.get("resources", {}).get("CPU", pod.ray_params.get("num-cpus"))
    limit = pod.spec["containers"][0].get("resources", {}).get("limits", {}).get("cpu")
    return quantity(given if given is not None else limit) or 0.0


def _most(model: ModelOptions) -> int:
    return model.num_replicas if model.autoscaling_config is None else model.autoscaling_config.max_replicas


RULES = (
    ray_asks_for_a_token,
    operator_accepts_the_cluster,
    ray_start_takes_the_flags,
    ports_do_not_collide,
    head_does_not_work,
    serve_config_is_rays,
    serve_config_is_ours,
    gateways_have_pods,
    models_have_pods,
    autoscaling_has_an_autoscaler,
)
