"""A pod's last command: the cluster is told, and the pod waits for its replicas, not for ever."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from serve.deployments import leave


@pytest.fixture
def replica():
    """A process that has the title of one of Serve's replicas."""
    process = subprocess.Popen(["ray::ServeReplica:tandem:gateway", "60"], executable="/bin/sleep")
    yield process
    process.kill()
    process.wait()


def test_it_returns_when_no_replica_is_left(replica, monkeypatch):
    told, looks, process = [], [], psutil.Process(replica.pid)

    def processes():
        looks.append(process.is_running())
        if len(looks) == 3:
            replica.kill()
            replica.wait()
        return [process]

    monkeypatch.setattr(psutil, "process_iter", processes)
    monkeypatch.setattr(leave, "announce", told.append)
    monkeypatch.setattr(leave, "POLL_S", 0.01)
    monkeypatch.setattr("sys.argv", ["leave", "--timeout-s", "60"])
    leave.main()
    assert told == [60.0] and looks == [True] * 3


def test_it_returns_in_time_when_a_replica_stays(replica, monkeypatch):
    monkeypatch.setattr(leave, "announce", lambda timeout_s: None)
    monkeypatch.setattr("sys.argv", ["leave", "--timeout-s", "0.1"])
    leave.main()
    assert replica.poll() is None


def test_a_cluster_that_is_gone_is_told_and_does_not_hold_the_pod(monkeypatch, capsys):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    leave.announce(5.0)
    assert "could not leave the cluster" in capsys.readouterr().err


def test_the_command_is_one_that_ray_has():
    """It is hidden in Ray's help and not promised."""
    from ray.scripts.scripts import cli

    options = {name for parameter in cli.commands["drain-node"].params for name in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options
