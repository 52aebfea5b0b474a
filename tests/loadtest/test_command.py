"""`tandem loadtest` as it is typed: against a gateway with real HTTP, and against servers that go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from gateway_fakes import FakeBackend, fake_gateway, ids
from gateway_image_fakes import FakeImageBackend
from PIL import Image

from loadtest import command
from loadtest.flags import parser
from loadtest.session import NotReady
from serve.cli import main
from serve.gateway.server import GatewayServer
from serve.options import GatewayOptions

QUICK = ("--no-progress", "--num-warmups", "1", "--ready-check-timeout-sec", "0")


def drawn(request, index, step) -> bytes:
    """A picture of its own for each seed, as a file that decodes."""
    image = Image.new("RGB", (request.width, request.height), (1, 2, 3))
    image.putpixel((step % request.width, 0), ((request.seed + index) % 251, 200, step))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@contextlib.asynccontextmanager
async def serving(*backends) -> AsyncIterator[str]:
    """The URL of a gateway over these backends."""
    async with fake_gateway(*backends) as gateway:
        server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain)
        _, port = await server.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            await server.aclose()


async def done(action: str, folder: Path, *flags: str) -> tuple[int, dict]:
    """Exit status and result."""
    args = parser().parse_args([action, *QUICK, "--result-dir", str(folder), "--result-filename", "r.json", *flags])
    status = await command._ACTIONS[action](args)
    return status, json.loads((folder / "r.json").read_text())


def test_a_mixed_load_leaves_figures_rows_and_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loadtest.session.METRICS_LAG_S", 0.0)

    async def scenario():
        async with serving(FakeBackend(reply=ids("x") * 8), FakeImageBackend(picture=drawn)) as url:
            load = ["--num-prompts", "40", "--request-rate", "200", "--image-ratio", "0.3", "--image-previews", "2"]
            asked = ["--input-len", "12", "--output-len", "8", "--ignore-eos", "--goodput", "ttft:60000"]
            asked += ["--probe-request-rate", "50", "--save-detailed", "--image-repeat-ratio", "0.5"]
            return await done("run", tmp_path, "--base-url", url, *load, *asked)

    status, told = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert status == told["verdict"]["exit_status"]
    assert (told["completed"], told["failed"], told["good_share"]) == (40, 0, 1.0)
    text, image = told["groups"]["text"], told["groups"]["image"]
    assert text["total_output_tokens"] == 8 * text["completed"] and text["completed"] + image["completed"] == 40
    assert image["image_throughput"] > 0 and image["median_ttfp_ms"] > 0 and len(told["ttfts"]) == 40
    checks = told["checks"]
    assert checks["counted"] == min(20, text["completed"]) and checks["prompt_tokens_off"] == 0.0
    assert checks["images"] == image["completed"] and checks["repeated"] > 0 and checks["different_hash"] == 0
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {row["group"] for row in rows} == {"text", "image", "probe"}
    assert "Output token throughput" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and not re.search(r"(?:src|href)=|url\(|@import", page) and len(page) < 300_000
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)


def test_a_search_finds_what_the_limits_allow_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loadtest.session.METRICS_LAG_S", 0.0)

    async def scenario():
        async with serving(FakeBackend(reply=ids("x") * 4)) as url:
            load = ["--base-url", url, "--num-prompts", "8", "--output-len", "4", "--input-len", "4"]
            rates = ["--search-start", "200", "--search-limit", "400", "--goodput", "e2el:60000"]
            return await done("search", tmp_path, *load, *rates)

    status, told = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert (status, told["max_rate_at_slo"]) == (0, 400)
    tried = [(one["request_rate"], one["is_confirmation"]) for one in told["trials"]]
    assert tried == [(200, False), (400, False), (400, True)]
    page = (tmp_path / "r.html").read_text()
    assert "400/s holds" in page and "Good requests" in page
    files = [str(tmp_path / "r.json")] * 2
    command._compare(parser().parse_args(["compare", *files, "-o", str(tmp_path / "c.html")]))
    both = (tmp_path / "c.html").read_text()
    assert "Side by side" in both and both.count("<th>openai-chat") == 2


CHUNK = b'data: {"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}\n\n'


@contextlib.asynccontextmanager
async def crashing(num_answers: int) -> AsyncIterator[str]:
    """A server that breaks off in the middle of the answer after so many, and takes no connections from then on."""
    left = num_answers

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = re.search(r"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith("get"):
                    body = b'{"data": [{"id": "m"}]}' if "models" in head else b""
                elif "tokenize" in head:
                    body = b'{"count": 1}'
                else:
                    left -= 1
                    body = CHUNK if left >= 0 else b""
                if not body and not head.startswith("get"):
                    server.close()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ndata: ")
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def test_a_crash_of_the_server_ends_the_run_with_a_verdict(tmp_path, capsys):
    async def scenario():
        async with crashing(num_answers=20) as url:
            load = ["--backend", "openai", "--max-concurrency", "2", "--num-prompts", "100000", "--output-len", "1"]
            return await done("run", tmp_path, "--base-url", url, *load, "--lost-after", "0.5")

    status, told = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert (status, told["verdict"]["name"]) == (3, "server_lost")
    assert "nothing more" in told["verdict"]["reason"] and told["completed"] >= 10
    assert any("connect" in kind for kind in told["errors_by_kind"])
    assert "Traceback" not in capsys.readouterr().out


def test_nobody_at_the_address_is_said_in_a_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["loadtest", "--base-url", "http://127.0.0.1:9", *QUICK])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("tandem loadtest: 127.0.0.1:9 is not ready")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["run", "--goodput", "speed:1"], "--goodput"),
        (["run", "--stages", "quick"], "stage 'quick'"),
        (["run", "--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["run", "--dataset-path", "x"], "--dataset-path"),
        (["run", "--dataset-name", "azure", "--dataset-path", "/nowhere"], "/nowhere"),
        (["run", "--metadata", "x"], "KEY=VALUE"),
        (["run", "--tokenizer", "/nowhere"], "tokenizer.json"),
        (["search"], "--goodput"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_asked(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["loadtest", *flags, *QUICK, "--base-url", "http://127.0.0.1:9"])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_in_the_servers_words(tmp_path):
    async def scenario():
        async with serving(FakeBackend()) as url:
            with pytest.raises(NotReady, match="404"):
                await done("run", tmp_path, "--base-url", url, "--model", "nobody")
            with pytest.raises(NotReady, match="--image-model"):
                await done("run", tmp_path, "--base-url", url, "--dataset-name", "image")

    asyncio.run(asyncio.wait_for(scenario(), 30))
