"""An image model over ranks as a user starts it: pictures as told, and no process left behind."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from serving import serving

from models.embedded.captions import plain_prompt
from models.embedded.paths import FOLDER
from models.embedded.picture_reader import read_picture
from models.embedded.pictures import combinations


def test_rows_and_tokens_over_ranks_draw_what_is_asked_and_end_with_the_server():
    sizes = ("--cfg-parallel-size", "2", "--ulysses-degree", "2")
    with serving(str(FOLDER / "tandem-image"), "--no-ray", "--threads", "1", *sizes) as server:
        asked = combinations("held_out")[0]
        body = {"model": "tandem-image", "prompt": plain_prompt(asked), "seed": 0}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
        image = np.array(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB"))
        assert read_picture(torch.from_numpy(image).permute(2, 0, 1) / 255).shows(asked)
        processes = server.children()
        assert sum("serve.ranks.peer" in " ".join(process.cmdline()) for process in processes) == 3
        assert sum("rank ready" in line for line in server.lines) == 4
        assert server.terminate() == 0
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
