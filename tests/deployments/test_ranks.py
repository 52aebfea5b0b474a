"""Ranks as actors of a placement group: the group's own drills, with Ray between driver and peers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import ray
from ranks_worker import WORKER, message, sum_here
from ray.exceptions import RayActorError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from serving import eventually

from serve.deployments.ranks import RayLauncher, bundles
from serve.options import ModelOptions
from serve.ranks.group import RankGroup

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ModelOptions(model="any", tensor_parallel_size=3, num_cpus=0.1)


class Driver:
    """A replica's actor, with nothing but its ranks."""

    def start(self, driver_rank: int, host: str | None) -> list[int]:
        launcher = RayLauncher(MODEL)
        if host is not None:  # as if the peers were on other nodes
            launcher.host, launcher.is_here = host, lambda rank, driver_rank: False
        self._launcher = launcher
        devices = launcher.devices("cpu", MODEL.num_ranks)
        self._group = RankGroup.start(WORKER, devices, driver_rank=driver_rank, launcher=launcher)
        return [answer["pid"] for answer in self._group.call("load")]

    def sum(self, size: int) -> float:
        self._group.tell(message(size=size, sums=True))
        try:
            return sum_here()
        except RuntimeError as error:
            raise RuntimeError(str(self._group.explain(error))) from error

    def close(self) -> str:
        self._group.close()
        return str(self._group.directory)

    def die(self) -> None:
        """As a replica whose engine hangs: its peers may be stopped."""
        self._launcher.kill()
        os._exit(70)


@pytest.fixture(scope="module")
def cluster():
    path = f"{ROOT}:{ROOT / 'tests'}"
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def driver(cluster):
    group = placement_group(bundles(MODEL), strategy="PACK")
    ray.get(group.ready(), timeout=60)
    strategy = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )
    yield ray.remote(Driver).options(num_cpus=0.1, scheduling_strategy=strategy).remote()
    remove_placement_group(group)


def start(driver, driver_rank: int = 0, host: str | None = None) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in ray.get(driver.start.remote(driver_rank, host), timeout=120)]


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != "zombie" for process in processes)


@pytest.mark.parametrize(("driver_rank", "host"), [(1, None), (0, "127.0.0.1")], ids=["shared memory", "tcp"])
def test_actors_are_peers_like_any_other(driver, driver_rank, host):
    peers = start(driver, driver_rank, host)
    assert len(peers) == 2
    assert [ray.get(driver.sum.remote(size), timeout=60) for size in (100, 1 << 20, 100)] == [3.0] * 3
    directory = ray.get(driver.close.remote(), timeout=60)
    eventually(lambda: are_gone(peers))
    assert not Path(directory).exists()


def test_a_killed_actor_is_named(driver):
    peers = start(driver)
    peers[1].kill()
    with pytest.raises(RuntimeError, match=rf"rank 2 \(actor with pid {peers[1].pid}\) failed"):
        ray.get(driver.sum.remote(100), timeout=60)
    eventually(lambda: are_gone(peers))


def test_actors_end_with_their_driver_also_when_they_are_stopped(driver):
    peers = start(driver)
    peers[0].suspend()
    with pytest.raises(RayActorError):
        ray.get(driver.die.remote(), timeout=60)
    eventually(lambda: are_gone(peers))


def test_actors_end_at_once_when_their_driver_is_killed(driver):
    peers = start(driver)
    killed = psutil.Process(peers[0].pid).parent().children()  # the raylet's workers, the driver among them
    for process in killed:
        if "Driver" in " ".join(process.cmdline()):
            process.kill()
    eventually(lambda: are_gone(peers))
