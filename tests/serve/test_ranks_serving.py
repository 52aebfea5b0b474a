"""`tandem serve` of a model on two ranks, broken from outside: what clients see, that it serves again, what is left."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import psutil
import pytest
from serving import Serving, eventually, serving
from tiny import tiny_folder

OPTIONS = ("--no-ray", "--served-model-name", "tiny", "--threads", "1", "--tensor-parallel-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(folder):
    with serving(str(folder), *OPTIONS, "--step-timeout-s", "3") as running:
        yield running


def ask(server: Serving, **fields) -> httpx.Response:
    body = {"model": "tiny", "prompt": "the red fox", "temperature": 0, "ignore_eos": True, "max_tokens": 16, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def answer(server: Serving) -> str:
    return ask(server).json()["choices"][0]["text"]


def peers(server: Serving) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "serve.ranks.peer" in " ".join(child.cmdline())]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == "zombie"


def streamed(server: Serving, broken) -> str:
    """The text of a stream after the first event of which `broken` is called."""
    fields = {"model": "tiny", "prompt": "the red fox", "temperature": 0, "ignore_eos": True, "max_tokens": 1000}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json={**fields, "stream": True}, timeout=90) as response:
        events = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        chunks = [next(events)]
        broken()
        chunks += [event for event in events if event != "[DONE]"]
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("drill", ["killed", "stopped"])
def test_a_lost_rank_costs_its_streams_a_pause_and_the_model_serves_again(server, drill):
    before, undisturbed = answer(server), streamed(server, lambda: None)
    (peer,) = peers(server)
    driver = peer.parent()
    assert streamed(server, peer.kill if drill == "killed" else peer.suspend) == undisturbed
    eventually(lambda: is_gone(peer) and is_gone(driver), within_s=30)
    eventually(lambda: ask(server).status_code == 200, within_s=90)
    assert answer(server) == before
    assert len(peers(server)) == 1
    words = f"rank 1 (pid {peer.pid}) failed: killed by SIGKILL" if drill == "killed" else "step_timeout_s"
    assert any("replica ends" in line and words in line for line in server.lines)


def test_the_logs_of_ranks_are_told_apart(server):
    assert any("rank=1 process started" in line for line in server.lines)


def test_the_shared_memory_has_no_name_and_the_directory_of_the_start_is_gone(server):
    mapped = [item.path for peer in peers(server) for item in peer.memory_maps() if "tandem-ranks" in item.path]
    assert [path.removesuffix(" (deleted)") for path in mapped] == ["/memfd:tandem-ranks"]
    address = next(found[1] for line in server.lines if (found := re.search(r"address=unix:(\S+)", line)))
    assert not list(Path(address).parent.glob("tandem-ranks-*"))


def test_a_killed_command_leaves_no_process_not_even_one_that_is_stopped(server):
    """Last of those that share the server: it ends it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    peers(server)[0].suspend()
    server.process.kill()
    eventually(lambda: all(is_gone(child) for child in children))


def test_sigterm_leaves_nothing_behind(folder):
    with serving(str(folder), *OPTIONS) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(peers(server)) == 1
        assert server.terminate() == 0
        assert all(is_gone(child) for child in children)
