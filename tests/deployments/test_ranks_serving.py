"""`tandem serve` of a model on two ranks of a local Ray: the answers of one rank, and a rank that is lost."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import psutil
import pytest
from serving import Serving, eventually, serving
from tiny import tiny_folder

pytestmark = pytest.mark.ray
OPTIONS = ("--served-model-name", "tiny", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(folder):
    with serving(str(folder), *OPTIONS, "--tensor-parallel-size", "2", timeout_s=180) as running:
        yield running


def ask(server: Serving) -> httpx.Response:
    body = {"model": "tiny", "prompt": "the red fox", "temperature": 0, "ignore_eos": True, "max_tokens": 16}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def answer(server: Serving) -> str:
    return ask(server).json()["choices"][0]["text"]


def workers(server: Serving, title: str) -> list[psutil.Process]:
    """Ray's processes, by the title that it gives them."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if title in " ".join(child.cmdline())]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == "zombie"


def test_two_ranks_give_the_answer_of_one(server, folder):
    with serving(str(folder), "--no-ray", *OPTIONS) as alone:
        expected = answer(alone)
    assert answer(server) == expected
    assert len(workers(server, "PeerActor")) == 1


def test_a_killed_rank_costs_its_stream_a_pause_and_the_replica_is_replaced(server):
    """Ray may take longer to replace it than a stream waits."""
    before = answer(server)
    (peer,), (driver,) = workers(server, "PeerActor"), workers(server, "ServeReplica:tandem:model-tiny")
    fields = {"model": "tiny", "prompt": "the red fox", "ignore_eos": True, "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=60) as response:
        events = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        next(events)
        peer.kill()
        *_, last, end = events
    assert end == "[DONE]" or json.loads(end)["error"]["code"] in ("engine_dead", "replica_lost", "unavailable"), last
    eventually(lambda: is_gone(driver), within_s=30)
    eventually(lambda: ask(server).status_code == 200, within_s=120)
    assert answer(server) == before
    assert len(workers(server, "PeerActor")) == 1


def test_sigterm_leaves_nothing_behind(server):
    """Last of those that share the server: it ends it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.terminate() == 0
    eventually(lambda: all(is_gone(child) for child in children), within_s=20)
