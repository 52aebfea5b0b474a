"""How a group of ranks fails: each drill with real processes, of which nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from ranks_worker import WORKER, message, sum_here
from serving import eventually

from serve.errors import ConfigError, EngineDead
from serve.ranks.group import RankGroup

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def pair():
    """A driver and one peer, to be broken."""
    with RankGroup.start(WORKER, ["cpu"] * 2) as group:
        yield group
    assert_nothing_is_left(group)


def peers(group: RankGroup) -> list[psutil.Process]:
    return [psutil.Process(answer["pid"]) for answer in group.call("load")]


def assert_nothing_is_left(group: RankGroup) -> None:
    assert not group.directory.exists()
    assert not [child for child in psutil.Process().children() if "serve.ranks.peer" in " ".join(child.cmdline())]


def test_the_directory_is_private_and_ends_with_the_start(pair):
    assert pair.directory.stat().st_mode & 0o777 == 0o700
    pair.watch(lambda error: None)
    assert not pair.directory.exists()
    pair.tell(message(sums=True))
    assert sum_here() == 2.0


def test_a_rank_that_raises_is_heard_in_its_own_words_and_ends_the_others():
    deaths: list[BaseException] = []
    died = threading.Event()
    with RankGroup.start(WORKER, ["cpu"] * 3) as group:
        others = peers(group)
        group.watch(lambda error: (deaths.append(error), died.set()))
        group.tell(message(sums=True, raises=2))
        with pytest.raises(RuntimeError) as here:
            sum_here()
        explained = group.explain(here.value)
        assert isinstance(explained, EngineDead) and "ValueError: these are the words of rank 2" in str(explained)
        assert died.wait(10)
        assert not any(peer.is_running() for peer in others)
        with pytest.raises(EngineDead, match="words of rank 2"):
            group.tell(message())
        with pytest.raises(EngineDead, match="words of rank 2"):
            group.call("told")
    assert deaths == [group.failure]
    assert_nothing_is_left(group)


def test_a_killed_rank_fails_the_collective_and_is_named(pair):
    (peer,) = peers(pair)
    peer.suspend()
    pair.tell(message(sums=True))
    threading.Timer(0.2, peer.kill).start()
    with pytest.raises(RuntimeError) as here:
        sum_here()
    assert f"rank 1 (pid {peer.pid}) failed: killed by SIGKILL" in str(pair.explain(here.value))


def test_closing_ends_a_rank_that_hangs(pair):
    """What the engine's deadline leads to: the peer is stopped, the driver stands in the collective."""
    (peer,) = peers(pair)
    peer.suspend()
    pair.tell(message(sums=True))
    closing = threading.Timer(0.2, pair.close)
    closing.start()
    with pytest.raises(RuntimeError):
        sum_here()
    closing.join()
    assert not peer.is_running()


def test_a_start_that_fails_raises_what_the_rank_said():
    with (
        pytest.raises(ConfigError, match="rank 1 finds no weights") as refused,
        RankGroup.start(WORKER, ["cpu"] * 2) as group,
    ):
        group.call("load", fails=1)
    assert refused.value.param == "model"
    assert_nothing_is_left(group)


def test_a_worker_that_cannot_be_imported_is_named_at_once():
    with pytest.raises(EngineDead, match=r"rank 1 .*ModuleNotFoundError: No module named 'no_such_module'"):
        RankGroup.start("no_such_module:Worker", ["cpu"] * 2)


def test_peers_of_a_killed_driver_end_at_once_and_leave_nothing():
    code = f"import sys; sys.path[:] = {sys.path!r}; import ranks_worker; ranks_worker.drive_until_killed()"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with driver:
        said = json.loads(driver.stdout.readline())
        living = [psutil.Process(pid) for pid in said["pids"]]
        assert len(living) == 2 and Path(said["directory"]).exists()
        driver.kill()
    eventually(lambda: not any(peer.is_running() and peer.status() != "zombie" for peer in living))
    eventually(lambda: not Path(said["directory"]).exists())
