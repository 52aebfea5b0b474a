"""The embedded image model, as committed, draws what it is told: held-out combinations over HTTP, many at once.

Combinations of shape, colour and background of these prompts were never trained on
(`tests/models/test_embedded_image_pictures.py` proves the split). Seeds are fixed, so the committed weights pass or
fail for good.
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from serving import Serving, eventually, serving

from models.embedded.captions import plain_prompt
from models.embedded.paths import FOLDER
from models.embedded.picture_reader import read_picture
from models.embedded.pictures import combinations

SEEDS = 3
FLOOR = 0.9


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    if not (FOLDER / "tandem-image" / "model_index.json").exists():
        pytest.skip("the embedded image model is not here")
    with serving("--no-ray", "--threads", "1") as running:
        yield running


def pixels(b64_json: str) -> torch.Tensor:
    """[3, H, W] in 0..1."""
    image = np.array(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"))
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def test_nothing_but_the_command_serves_both_kinds(server):
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert {model["id"]: model["kind"] for model in models} == {"tandem-text": "text", "tandem-image": "image"}


def test_held_out_combinations_are_drawn_right(server):
    asked = [(combination, seed) for seed in range(SEEDS) for combination in combinations("held_out")]

    async def ask_all() -> list[torch.Tensor]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.images.generate(
                        model="tandem-image", prompt=plain_prompt(combination), extra_body={"seed": seed}
                    )
                    for combination, seed in asked
                )
            )
        return [pixels(answer.data[0].b64_json) for answer in answers]

    shown = [read_picture(image).shows(combination) for image, (combination, _) in zip(asyncio.run(ask_all()), asked)]
    assert sum(shown) / len(shown) >= FLOOR
    assert server.metric("tandem_image_step_rows_sum") > server.metric("tandem_image_step_rows_count")  # they shared


def test_previews_sharpen_and_text_goes_on_meanwhile(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    said: list[str] = []

    def chat() -> None:
        answer = client.chat.completions.create(
            model="tandem-text", messages=[{"role": "user", "content": "What is 12 + 30?"}], temperature=0
        )
        said.append(answer.choices[0].message.content or "")

    talking = threading.Thread(target=chat)
    talking.start()
    events = list(
        client.images.generate(
            model="tandem-image",
            prompt="a red circle on a white background",
            stream=True,
            partial_images=3,
            extra_body={"seed": 1},
        )
    )
    talking.join(timeout=60)
    assert "42" in said[0]
    assert [event.type.rpartition(".")[2] for event in events] == [*["partial_image"] * 3, "completed"]
    final = pixels(events[-1].b64_json)
    far = [float((pixels(event.b64_json) - final).abs().mean()) for event in events[:-1]]
    assert far == sorted(far, reverse=True)


def test_client_that_leaves_frees_its_image(server):
    body = {
        "model": "tandem-image",
        "prompt": "a blue square on a black background",
        "stream": True,
        "stream_progress": True,
        "num_inference_steps": 250,
        "n": 4,
    }
    with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=30) as response:
        assert response.status_code == 200
        next(response.iter_lines())
    eventually(lambda: server.metric("tandem_requests_running") == 0)
