"""That pods may be drained, replaced and scaled without an outage."""

from __future__ import annotations

from collections.abc import Iterator

from serve.kubernetes.kustomize import identity
from serve.kubernetes.metric_names import unknown_metrics
from serve.kubernetes.overlay import Overlay, Pod, matches

Said = Iterator[tuple[str, str]]

CLOSING_S = 10.0
"""After a drain: the last words to clients, and the processes' end."""
LEAVE = ["python", "-m", "serve.deployments.leave"]
"""What a Ray pod runs before it ends (`serve/deployments/leave.py`)."""
SERVE_MARGIN_S = 10.0
"""That Serve waits beyond the drain (`SHUTDOWN_MARGIN_S` in `serve/deployments/app.py`)."""
WITH_SCALE = frozenset({"Deployment", "StatefulSet", "ReplicaSet"})


def drain_fits_the_grace_period(overlay: Overlay) -> Said:
    """terminationGracePeriodSeconds >= preStop + drain + closing, against the drain_timeout_s of the config file."""
    if overlay.options is None:
        return
    drain_s = overlay.options.gateway.drain_timeout_s
    for pod in overlay.pods:
        if pod.role not in ("gateway", "server", "models"):
            continue
        grace = float(pod.spec.get("terminationGracePeriodSeconds", 30))
        before = pod.spec["containers"][0].get("lifecycle", {}).get("preStop")
        if before is None:
            yield pod.place, "has no preStop: requests that are on their way when it ends are lost"
            continue
        if "sleep" in before:
            needed = before["sleep"]["seconds"] + drain_s + CLOSING_S
            sums = f"preStop {before['sleep']['seconds']} + drain_timeout_s {drain_s:g} + closing {CLOSING_S:g}"
        else:
            leaving = _leaving_s(before.get("exec", {}).get("command", []))
            if leaving is None:
                yield pod.place, f"its preStop is neither a sleep nor {' '.join(LEAVE)} --timeout-s N"
                continue
            if leaving < drain_s + SERVE_MARGIN_S:
                needed = drain_s + SERVE_MARGIN_S
                yield (
                    pod.place,
                    f"preStop gives up after {leaving:g} s; draining may take {needed:g} s (drain_timeout_s + 10)",
                )
            needed, sums = leaving + CLOSING_S, f"preStop {leaving:g} + closing {CLOSING_S:g}"
        if grace < needed:
            yield pod.place, f"terminationGracePeriodSeconds is {grace:g}, and {sums} is {needed:g}: raise it"


def unready_before_the_end(overlay: Overlay) -> Said:
    """A sleeping preStop must outlast what it takes for the pod to leave its Service."""
    for pod in overlay.pods:
        before = pod.spec["containers"][0].get("lifecycle", {}).get("preStop") or {}
        if "sleep" in before and before["sleep"]["seconds"] < 5:
            yield (
                pod.place,
                f"preStop sleeps {before['sleep']['seconds']} s; proxies need some 5 to hear that it leaves",
            )


def old_cluster_outlives_its_drain(overlay: Overlay) -> Said:
    """KubeRay deletes the old cluster this long after the new one serves."""
    for service in overlay.of("RayService"):
        delay = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
        drain = overlay.options.gateway.drain_timeout_s if overlay.options else 0.0
        if delay < drain:
            yield identity(service), f"rayClusterDeletionDelaySeconds is {delay}, below drain_timeout_s ({drain:g})"


def budgets_leave_room(overlay: Overlay) -> Said:
    """A budget over all pods blocks every node drain; Ray's pods know no shares."""
    for budget in overlay.of("PodDisruptionBudget"):
        spec = budget["spec"]
        pods = [pod for pod in overlay.pods if matches(spec.get("selector", {}), pod.labels)]
        if ("minAvailable" in spec) == ("maxUnavailable" in spec):
            yield identity(budget), "say either minAvailable or maxUnavailable"
            continue
        if any(pod.is_ray for pod in pods) and not isinstance(spec.get("minAvailable"), int):
            yield identity(budget), "Ray's pods have no scale subresource: only a whole number for minAvailable works"
            continue
        least = sum(_count(overlay, pod)[0] for pod in pods)
        if isinstance(spec.get("minAvailable"), int) and pods and spec["minAvailable"] >= least:
            yield identity(budget), f"wants {spec['minAvailable']} of {least} pods available: no node could be drained"


def gateways_have_a_budget(overlay: Overlay) -> Said:
    selectors = [budget["spec"].get("selector", {}) for budget in overlay.of("PodDisruptionBudget")]
    for pod in overlay.gateways:
        if not any(matches(selector, pod.labels) for selector in selectors):
            yield pod.place, "no PodDisruptionBudget keeps one of them when nodes are drained"


def gateways_are_spread(overlay: Overlay) -> Said:
    for pod in overlay.gateways:
        keys = [spread["topologyKey"] for spread in pod.spec.get("topologySpreadConstraints", ())]
        if "kubernetes.io/hostname" not in keys:
            yield pod.place, "no topologySpreadConstraint keeps them off one node"


def scalers_have_targets(overlay: Overlay) -> Said:
    """HPA and KEDA scale what is there and can be scaled: Ray's resources cannot."""
    for scaler in overlay.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        kind = target.get("kind", "Deployment")
        if kind not in WITH_SCALE:
            yield identity(scaler), f"{kind} has no scale subresource; on Ray, replicas scale by autoscaling_config"
        elif overlay.get(kind, target["name"]) is None:
            yield identity(scaler), f"its target {kind}/{target['name']} is not defined"
        least, most = _bounds(scaler)
        if least > most:
            yield identity(scaler), f"its least ({least}) is above its most ({most})"


def replicas_have_one_owner(overlay: Overlay) -> Said:
    """A number of replicas in a Deployment that is scaled puts it back at every apply."""
    for scaler in overlay.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = overlay.get(scaler["spec"]["scaleTargetRef"].get("kind", ""), scaler["spec"]["scaleTargetRef"]["name"])
        if target is not None and "replicas" in target["spec"]:
            yield identity(target), f"sets replicas, which {identity(scaler)} sets too; leave them out"


def scalers_ask_for_real_metrics(overlay: Overlay) -> Said:
    """A query of a metric that Tandem does not have is always empty, and scales nothing."""
    for scaler in overlay.of("ScaledObject"):
        for trigger in scaler["spec"].get("triggers", ()):
            for name in unknown_metrics(trigger.get("metadata", {}).get("query", "")):
                yield identity(scaler), f"asks for the metric {name!r}, which Tandem does not have"


def monitors_scrape_once(overlay: Overlay) -> Said:
    """Any gateway of a Ray cluster shows all processes: its monitor must make one target of several pods."""
    for monitor in overlay.of("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint.get("path") != "/metrics":
                yield identity(monitor), f"scrapes {endpoint.get('path')!r}; the metrics are at /metrics"
            merged = {rule.get("targetLabel") for rule in endpoint.get("relabelings", ())} >= {"__address__"}
            dropped = {
                rule.get("regex", "") for rule in endpoint.get("relabelings", ()) if rule.get("action") == "labeldrop"
            }
            if any(pod.is_ray for pod in overlay.gateways) and not (
                merged and any("pod" in regex for regex in dropped)
            ):
                yield (
                    identity(monitor),
                    "scrapes every gateway, each of which shows all: everything is counted several times",
                )


def _count(overlay: Overlay, pod: Pod) -> tuple[int, int]:
    for scaler in overlay.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        if (target.get("kind", "Deployment"), target["name"]) == (pod.owner["kind"], pod.owner["metadata"]["name"]):
            return _bounds(scaler)
    return pod.least, pod.most


def _bounds(scaler: dict[str, dict[str, int]]) -> tuple[int, int]:
    spec = scaler["spec"]
    return (
        spec.get("minReplicaCount", spec.get("minReplicas", 1)),
        spec.get("maxReplicaCount", spec.get("maxReplicas", 100)),
    )


def _leaving_s(command: list[str]) -> float | None:
    if command[: len(LEAVE)] != LEAVE or command[len(LEAVE) : -1] != ["--timeout-s"]:
        return None
    return float(command[-1]) if command[-1].replace(".", "", 1).isdecimal() else None


RULES = (
    drain_fits_the_grace_period,
    unready_before_the_end,
    old_cluster_outlives_its_drain,
    budgets_leave_room,
    gateways_have_a_budget,
    gateways_are_spread,
    scalers_have_targets,
    replicas_have_one_owner,
    scalers_ask_for_real_metrics,
    monitors_scrape_once,
)
