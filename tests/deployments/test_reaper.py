"""The reaper ends the processes it was given, and only them, when the one that started it is gone."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil

from serve.deployments import reaper

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def sleeper() -> subprocess.Popen:
    return subprocess.Popen(SLEEPER, stdin=subprocess.PIPE)


def test_what_is_left_is_killed_when_the_pipe_closes():
    mine, other = sleeper(), sleeper()
    process = reaper.watch_over([psutil.Process(mine.pid)])
    assert mine.poll() is None
    process.stdin.close()
    assert mine.wait(timeout=30) == -signal.SIGKILL
    assert process.wait(timeout=30) == 0 and other.poll() is None
    other.communicate()


def test_a_process_that_took_over_the_number_is_left_alone(monkeypatch):
    mine = sleeper()
    impostor = psutil.Process(mine.pid)
    monkeypatch.setattr(impostor, "create_time", lambda: 1.0)
    process = reaper.watch_over([impostor])
    process.communicate()
    assert process.returncode == 0 and mine.poll() is None
    mine.communicate()
