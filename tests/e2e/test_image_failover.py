"""`tandem serve` with two replicas that draw, one of which is killed: all pictures come, and no step goes back."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import Serving, eventually, serving
from tiny_pipelines import dit_pipeline

NUM_STEPS = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "dit"
    dit_pipeline().save_pretrained(folder)
    options = ("--no-ray", "--num-replicas", "2", "--threads", "1", "--served-model-name", "tiny", "--dtype", "float32")
    with serving(str(folder), *options) as running:
        yield running


class Client(threading.Thread):
    """Four pictures as a stream, with progress and previews."""

    def __init__(self, server: Serving, seed: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{server.url}/v1/images/generations"
        self._body = {"model": "tiny", "prompt": "3", "seed": seed, "n": 4, "num_inference_steps": NUM_STEPS}
        self._body |= {"stream": True, "partial_images": 2, "stream_progress": True}
        self.events: list[dict[str, Any]] = []

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=90) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(json.loads(line[6:]))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("type") == f"image_generation.{kind}"]

    def pictures(self) -> dict[int, np.ndarray]:
        return {
            event["index"]: np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))).astype(int)
            for event in self.of("completed")
        }


def start(server: Serving) -> list[Client]:
    clients = [Client(server, seed) for seed in range(10, 40, 10)]
    for client in clients:
        client.start()
    return clients


def join(clients: list[Client]) -> list[Client]:
    for client in clients:
        client.join(timeout=120)
        assert not client.is_alive()
    return clients


def test_killed_replica_costs_time_and_no_picture(server):
    undisturbed = join(start(server))
    clients = start(server)
    eventually(lambda: all(len(client.of("progress")) > 10 for client in clients), within_s=30, every_s=0.01)
    [victim] = server.children("replica-0-0")
    victim.kill()
    for client, before in zip(join(clients), undisturbed):
        assert len(client.of("completed")) == 4 and client.pictures().keys() == {0, 1, 2, 3}
        for index, picture in before.pictures().items():
            assert np.abs(client.pictures()[index] - picture).max() <= 1  # a step's mates may move a rounding
            steps = [event["step"] for event in client.of("progress") if event["index"] == index]
            assert steps == sorted(set(steps))
            previews = [e["partial_image_index"] for e in client.of("partial_image") if e["index"] == index]
            assert previews == [0, 1]
    assert server.metric("tandem_failovers_total") >= 1
