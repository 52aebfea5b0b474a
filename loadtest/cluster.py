"""A Ray cluster of several nodes on this machine, and one application on it, deployed as `serve deploy` does it.

The nodes are raylets of their own (`ray.cluster_utils.Cluster`): killing one takes all its workers along, as the loss
of a machine would. They share the machine's cores and its network, so what the loss of a network does is not shown.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtest.observer import Observer

ROOT = Path(__file__).resolve().parent.parent
APPLICATION = "tandem"
PATIENCE_S = 600.0
"""For anything to happen that is sure to: a loaded machine starts a replica in a minute."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_health_check_period_ms": "1000",  # with Ray's own values the loss of a node is known after half a minute
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def eventually(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """Poll until `condition()` is true and return its value. Raises TimeoutError."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within_s:g} s")
        time.sleep(0.1)  # other processes' states give no sign when they change
    return value


class LocalCluster:
    """A head node, to begin with. Close it: nothing of it is left then."""

    def __init__(self, *, num_cpus: int) -> None:
        self._before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        import ray
        from ray import serve as ray_serve
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
        ray.init(address=self._cluster.address, logging_level="WARNING", log_to_driver=False)
        ray_serve.start(proxy_location="Disabled", logging_config=_QUIET)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self._port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def deploy(self, model: dict[str, Any], *, num_replicas: int, drain_timeout_s: float) -> None:
        """The application with this model, or a change of it; returns when Serve is done. `num_replicas` is an override
        of Serve's, which changes nothing else; any other change replaces every process."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        gateway = {"port": self._port, "drain_timeout_s": drain_timeout_s}
        application = {
            "name": APPLICATION,
            "route_prefix": "/tandem",
            "import_path": "serve.deployments.app:build",
            "args": {"models": [model], "gateway": gateway},
            "deployments": [{"name": "model-" + model["served_model_name"][0], "num_replicas": num_replicas}],
        }
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema(applications=[application], logging_config=_QUIET))
        eventually(lambda: self._is_deployed(num_replicas), "the application is deployed")
        eventually(self.is_ready, "the gateway is ready")

    def _is_deployed(self, num_replicas: int) -> bool:
        from ray import serve as ray_serve

        application = ray_serve.status().applications[APPLICATION]
        if application.status == "DEPLOY_FAILED":
            raise RuntimeError(application.message)
        states = [deployment.replica_states for deployment in application.deployments.values()]
        numbers = sorted(sum(state.values()) for state in states)
        is_settled = all(set(state) <= {"RUNNING"} for state in states) and numbers == sorted([1, 1, num_replicas])
        return application.status == "RUNNING" and is_settled

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def metric(self, name: str) -> float:
        """The sum of its samples, over all processes."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10.0).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def observer(self) -> Observer:
        """Of the application that is deployed now, and of what replaces it."""
        from ray import serve as ray_serve

        from serve.deployments.secret import cluster_secret

        async def hub_address() -> str:
            handle = ray_serve.get_deployment_handle("hub", APPLICATION)
            return str(await asyncio.to_thread(lambda: handle.address.remote().result(timeout_s=10.0)))

        return Observer(hub_address, cluster_secret())

    def add_node(self, *, num_cpus: int) -> Any:
        return self._cluster.add_node(num_cpus=num_cpus)

    def kill_node(self, node: Any) -> None:
        """SIGKILL for its raylet; its workers notice."""
        self._cluster.remove_node(node, allow_graceful=False)

    def processes(self, title: str, node: Any = None) -> list[psutil.Process]:
        """Workers whose title, as Ray gives it to them, contains `title`; `node`: its own only."""
        parent = psutil.Process() if node is None else psutil.Process(raylet_pid(node))
        return [each for each in parent.children(recursive=True) if title in _command(each)]

    def close(self) -> None:
        """End everything, also what does not want to. Serve is not asked: it may have just lost what it runs on."""
        import ray

        children = psutil.Process().children(recursive=True)
        ours = [child for child in children if "ray" in _command(child)]
        try:
            ray.shutdown()
            self._cluster.shutdown()
        finally:
            _, alive = psutil.wait_procs(ours, timeout=10.0)
            for process in alive:
                process.kill()
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
