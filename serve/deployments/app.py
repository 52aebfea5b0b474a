"""The Ray Serve application: one deployment per model, one for the hub, one for the gateways.

    tandem serve --config FILE                            build_application(options)
    serve run serve.deployments.app:build config=FILE     build({"config": FILE})
    serve deploy deploy/ray-serve.yaml                    build(args), as its import_path and args say

All three give the same application. `args` are the keys of `serve/config.py`, or `config` alone: a file with them. The
gateway owns its socket: where Ray Serve's own HTTP proxy runs, give one of them another port.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from serve.config import load_config, parse_config
from serve.deployments.autoscaling import autoscaling_config
from serve.deployments.gateway import GatewayDeployment
from serve.deployments.hub import HubDeployment
from serve.deployments.node import num_nodes
from serve.deployments.ranks import bundles
from serve.deployments.replica import ReplicaDeployment
from serve.deployments.router import ChosenReplicaRouter
from serve.deployments.secret import cluster_secret
from serve.errors import ConfigError
from serve.gateway.hold import sleepers
from serve.options import ModelOptions, ServeOptions
from serve.replica import Served
from serve.replica import build as build_model

HEALTH_PERIOD_S = 2.0
"""How often Serve asks a replica for its health; Serve's default of 10 s leaves a dead engine in rotation for long."""
HEALTH_TIMEOUT_S = 10.0
SHUTDOWN_MARGIN_S = 10.0
"""Beyond the gateway's drain time, so that Serve never cuts off what the gateway still lets run."""

SHUTDOWN_LOOK_S = 0.2
"""How often Serve looks whether a part that is to stop has calls open."""

MAX_FAILED_STARTS = 3
"""Serve's own patience with one replica: what `serve deploy` started has nobody in front of it to try again."""


def build(args: dict[str, Any]) -> Application:
    """The application from plain data, as `serve run` and `serve deploy` call it. Raises ConfigError."""
    if args.keys() == {"config"}:
        return build_application(load_config(args["config"]))
    return build_application(parse_config(args, origin="args"))


def build_application(
    options: ServeOptions,
    *,
    host: str | None = None,
    max_failed_starts: int = MAX_FAILED_STARTS,
    build: Callable[..., Served] = build_model,
) -> Application:
    """The application of these options. A secret that the cluster keeps joins its processes and no others.

    `host` is where hub and replicas listen for them; None is each node's own address. `max_failed_starts`: of a
    deployment's first processes, before Serve gives the application up. `build`: loads a replica's model.
    """
    if options.gateway.port == 0 and options.gateway.num_gateways > 1:
        raise ConfigError(
            f"port is 0, any free one, and num_gateways is {options.gateway.num_gateways}; gateways listen at one "
            f"port, each on its node: give its number"
        )
    secret, ports = cluster_secret(), options.gateway.channel_ports
    elastic = {deployment_name(model): model.name for model in options.models if model.autoscaling_config is not None}
    hub = _deployment(HubDeployment, name="hub", max_surge_percent=100, ray_actor_options={"num_cpus": 0}).bind(
        secret, host, ports, elastic
    )
    total = sum(model.max_num_replicas for model in options.models)
    models = {
        model.name: _model(model, options, max_failed_starts).bind(
            model, secret, hub, host, ports, total, options.gateway.drain_timeout_s, build
        )
        for model in options.models
    }
    gateway = _deployment(
        GatewayDeployment,
        name="gateway",
        max_constructor_retry_count=max_failed_starts,
        num_replicas=options.gateway.num_gateways,
        ray_actor_options={"num_cpus": 0.25},
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        graceful_shutdown_timeout_s=options.gateway.drain_timeout_s + SHUTDOWN_MARGIN_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        **_spread(options.gateway.num_gateways),
    )
    return gateway.bind(options.gateway, secret, hub, models, sleepers(options.models), host is None)


def _model(model: ModelOptions, options: ServeOptions, max_failed_starts: int) -> ray_serve.Deployment:
    actor: dict[str, Any] = {"num_cpus": model.num_cpus, "num_gpus": model.gpus_per_rank}
    ranks: dict[str, Any] = {}
    if model.num_ranks == 1:
        actor["accelerator_type"] = model.accelerator_type
    else:  # on one node if they fit one
        ranks = {"placement_group_bundles": bundles(model), "placement_group_strategy": "PACK"}
    return _deployment(
        ReplicaDeployment,
        name=deployment_name(model),
        max_constructor_retry_count=max_failed_starts,
        ray_actor_options=actor,
        # The engine batches what runs and bounds what waits; Serve must not hold requests back before it.
        max_ongoing_requests=model.max_num_seqs + model.max_num_waiting,
        max_surge_percent=model.max_surge_percent,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        graceful_shutdown_timeout_s=options.gateway.drain_timeout_s + SHUTDOWN_MARGIN_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        request_router_config={"request_router_class": ChosenReplicaRouter},
        **_number(model),
        **ranks,
    )


def _spread(num_gateways: int) -> dict[str, Any]:
    """Gateways over the nodes that there are now: evenly, and none has more than its share, also after a restart.

    A node then has no room for the new one beside the one that an update replaces; elsewhere an update starts it first.
    """
    nodes = num_nodes()
    if num_gateways > 1 and nodes > 1:
        return {"max_replicas_per_node": math.ceil(num_gateways / nodes)}
    return {"max_surge_percent": 100}


def _number(model: ModelOptions) -> dict[str, Any]:
    if model.autoscaling_config is None:
        return {"num_replicas": model.num_replicas}
    return {"autoscaling_config": autoscaling_config(model.autoscaling_config)}


def _deployment(part: type, **options: Any) -> ray_serve.Deployment:
    deployment: ray_serve.Deployment = ray_serve.deployment(**options)(part)
    return deployment


def deployment_name(model: ModelOptions) -> str:
    """A model's name in the characters Ray Serve allows."""
    return "model-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", model.name).strip("-")
