"""Every rank of every replica gets a device of its own where there are enough, and all share them where not."""

from __future__ import annotations

import subprocess

import pytest

from serve.devices import assign_devices, device_name, visible_devices
from serve.options import ModelOptions
from serve.ranks.launch import LocalLauncher
from serve.ranks.spec import PeerSpec


def models(*sizes: tuple[int, int], **more) -> list[ModelOptions]:
    return [
        ModelOptions(model=f"m{i}", kind="text", tensor_parallel_size=ranks, num_replicas=replicas, **more)
        for i, (ranks, replicas) in enumerate(sizes)
    ]


def test_ranks_of_replicas_never_meet_on_a_device():
    assigned = assign_devices(models((2, 2), (1, 1)), list("01234567"))
    assert assigned == [[("0", "1"), ("2", "3")], [("4",)]]


def test_with_fewer_devices_than_ranks_everyone_sees_all():
    assert assign_devices(models((1, 1), (1, 1)), ["0"]) == [[()], [()]]


def test_what_computes_on_the_processor_takes_no_device():
    on_cpu, on_gpu = models((2, 1), device="cpu")[0], models((1, 1))[0]
    assert assign_devices([on_cpu, on_gpu], ["3"]) == [[()], [("3",)]]


@pytest.mark.parametrize(("shown", "device", "name"), [("4,6", "cuda:1", "cuda:6"), ("", "cpu", "cpu")])
def test_a_device_is_named_as_on_the_machine(monkeypatch, shown, device, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert device_name(device) == name


def test_what_may_not_be_used_is_not_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 2, GPU-8a ")
    assert visible_devices() == ["2", "GPU-8a"]


def test_a_peer_sees_one_device_that_is_not_the_drivers(monkeypatch):
    """The driver, whatever its rank, computes on the first one it sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    shown = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: shown.update(env) or pytest.fail("enough"))
    seen = []
    for rank in (0, 1, 3):
        with pytest.raises(pytest.fail.Exception, match="enough"):
            LocalLauncher().launch(peer_spec(rank, driver_rank=2))
        seen.append(shown["CUDA_VISIBLE_DEVICES"])
    assert seen == ["5", "6", "7"]


def peer_spec(rank: int, *, driver_rank: int) -> PeerSpec:
    return PeerSpec(
        worker="", rank=rank, world_size=4, driver_rank=driver_rank, device="cuda:0", threads=1,
        address="", secret="", store="", directory=None,
    )  # fmt: skip
