"""`tandem serve` with two replicas, one of which is killed under streaming clients: they notice a pause, no more."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from serving import Serving, eventually, serving
from tiny import tiny_folder

NUM_TOKENS = 150
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 8, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "seed": 9, "n": 2},
    {"temperature": 0.7, "seed": 10, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 1.0, "seed": 11, "n": 2, "stop": ["nowhere to be found"]},
    {"temperature": 1.0, "seed": 12, "structured_outputs": {"regex": "([a-c]{3} ){37}"}, "ignore_eos": False},
    {"temperature": 1.0, "seed": 13, "prompt": ["the red fox", "a grey cat"]},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Two replicas that let streams run for half a second when they are told to end."""
    folder = tiny_folder(tmp_path_factory.mktemp("m"), "qwen3", num_hidden_layers=16, max_position_embeddings=4096)
    options = ("--no-ray", "--num-replicas", "2", "--threads", "1", "--served-model-name", "tiny", "--dtype", "float32")
    options = (*options, "--drain-timeout-s", "0.5", "--canary-period-s", "0.2")
    with serving(str(folder), *options) as running:
        yield running


class Client(threading.Thread):
    """Reads one streamed completion."""

    def __init__(self, server: Serving, fields: dict[str, Any], num_tokens: int = NUM_TOKENS) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/v1/completions"
        self._body = {"model": "tiny", "prompt": "the red fox", "stream": True, "ignore_eos": True} | fields
        self._body |= {"max_tokens": num_tokens, "stream_options": {"include_usage": True}}
        self.chunks: list[dict[str, Any]] = []
        self.is_complete = False
        self.failure: Any = None

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.is_complete = True
                    elif line.startswith("data: "):
                        self.chunks.append(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.failure = error

    def answer(self) -> list[Any]:
        """Per choice its text and why it ended; then the usage."""
        assert self.is_complete and self.failure is None, (self.failure, self.chunks[-1:])
        choices: dict[int, Any] = {}
        for chunk in self.chunks:
            for part in chunk["choices"]:
                own = choices.setdefault(part["index"], {"text": "", "reason": None})
                own["text"] += part["text"]
                own["reason"] = part["finish_reason"] or own["reason"]
        usage = self.chunks[-1]["usage"]
        return [sorted(choices.items()), usage["prompt_tokens"], usage["completion_tokens"]]

    def logprobs(self) -> list[float]:
        parts = (part for chunk in self.chunks for part in chunk["choices"] if part.get("logprobs"))
        return [value for part in parts for value in part["logprobs"]["token_logprobs"]]


def start(server: Serving) -> list[Client]:
    clients = [Client(server, fields) for fields in REQUESTS]
    for client in clients:
        client.start()
    return clients


def answers(clients: list[Client]) -> list[Any]:
    for client in clients:
        client.join(timeout=90)
        assert not client.is_alive()
    return [client.answer() for client in clients]


def test_idle_replicas_prove_themselves_and_nobody_sees_it(server):
    """First here, for nothing has been asked yet."""
    eventually(lambda: server.metric("tandem_canary_seconds_count") >= 4, within_s=60)
    for name in ("jobs", "prefix_cache_queries_tokens", "output_tokens"):
        assert server.metric(f"tandem_{name}_total") == 0
    assert server.metric("tandem_step_seconds_count") == server.metric("tandem_kv_cache_usage_ratio") == 0


def test_killed_replica_costs_a_pause_and_no_token(server):
    undisturbed = start(server)
    expected = answers(undisturbed)
    clients = start(server)
    eventually(lambda: all(len(client.chunks) > 20 for client in clients), within_s=60, every_s=0.01)
    [victim] = server.children("replica-0-0")
    victim.kill()
    assert answers(clients) == expected
    for client, before in zip(clients, undisturbed):
        assert client.logprobs() == pytest.approx(before.logprobs(), abs=1e-3)
    assert server.metric("tandem_failovers_total") >= 1
    assert server.metric("tandem_quarantines_total") == 0


def test_streams_that_outlast_a_drain_go_on_elsewhere(server):
    """Each replica ends in turn, as in a rolling update: more ends than deaths a request may survive."""
    eventually(lambda: server.metric("tandem_replicas") == 2, within_s=60)
    before = server.metric("tandem_failovers_total")
    client = Client(server, {"temperature": 1.0, "seed": 7}, num_tokens=1200)
    client.start()
    for name in ("replica-0-0", "replica-0-1", "replica-0-0"):
        eventually(lambda: server.metric("tandem_replicas") == 2, within_s=60)
        victim = server.children(name)[-1]
        victim.terminate()
        victim.wait(timeout=30)
    [answer] = answers([client])
    undisturbed = Client(server, {"temperature": 1.0, "seed": 7}, num_tokens=1200)
    undisturbed.start()
    assert answers([undisturbed]) == [answer]
    assert server.metric("tandem_failovers_total") > before and server.metric("tandem_quarantines_total") == 0
