"""`tandem serve` on an embedded Ray, from outside: the same answers, replica loss, clean leaving, the right files."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from otlp import collecting
from PIL import Image
from serving import Serving, eventually, launched, serving
from tiny import tiny_folder
from tiny_pipelines import dit_pipeline

pytestmark = pytest.mark.ray
TRAPS = ("serve.py", "models/__init__.py", "request.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", num_hidden_layers=16, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "dit"
    dit_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def collector():
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def server(folder, pictures, tmp_path_factory, collector):
    """Two replicas of a text model and one of an image model behind one gateway, started from a folder whose files must
    never be imported."""
    trapped = tmp_path_factory.mktemp("trapped")
    for trap in TRAPS:
        (trapped / trap).parent.mkdir(exist_ok=True)
        (trapped / trap).write_text("raise SystemExit('imported from the working directory')\n")
    text = {"model": str(folder), "served_model_name": ["tiny"], "num_replicas": 2, "threads": 1}
    image = {"model": str(pictures), "served_model_name": ["tiny-image"], "threads": 1}
    config = trapped / "tandem.yaml"
    config.write_text(json.dumps({"models": [text, image]}))
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serving("--config", str(config), cwd=trapped, timeout_s=180, **environment) as running:
        yield running


def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def body(**fields):
    message = {"role": "user", "content": "the red fox"}
    return {"model": "tiny", "messages": [message], "temperature": 0, "ignore_eos": True, "max_tokens": 16, **fields}


def ask(server: Serving, **fields):
    return httpx.post(f"{server.url}/v1/chat/completions", json=body(**fields), timeout=60)


def replicas(server: Serving) -> list[psutil.Process]:
    """The worker processes of the model's replicas, by the title Ray gives them."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    title = re.compile(r"ServeReplica:tandem:model-tiny(?!-image)")
    return [child for child in children if title.search(" ".join(child.cmdline()))]


def test_a_trace_crosses_ray_to_the_replica(server, collector):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "traced"}
    httpx.post(f"{server.url}/v1/chat/completions", json=body(), headers=headers, timeout=60).raise_for_status()
    root = eventually(lambda: collector.root("traced"), within_s=20)
    tree = ["chat tiny", ["replica", ["job", "queue", "prefill", "decode"]]]
    eventually(lambda: collector.tree(root) == tree, within_s=20)
    [replica] = collector.children(root)
    [job] = collector.children(replica)
    assert (root.trace, root.parent) == (trace, parent)
    assert job.process == replica.attributes["tandem.replica.id"] != root.process


def test_streamed_and_whole_answers_are_equal(server):
    whole = ask(server).json()
    assert whole["usage"]["completion_tokens"] == 16
    fields = body(stream=True)
    extra = {"ignore_eos": fields.pop("ignore_eos")}
    chunks = list(client(server).chat.completions.create(**fields, extra_body=extra))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole["choices"][0]["message"]["content"]


def test_many_requests_at_once_all_end_right(server):
    expected = ask(server).json()["choices"][0]["message"]["content"]
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(server).json()["choices"][0]["message"]["content"]))
        for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 24


def test_images_come_beside_text_and_a_seed_gives_the_same_again(server):
    def image(**fields) -> bytes:
        answer = client(server).images.generate(
            model="tiny-image", prompt="3", extra_body={"seed": 7, "num_inference_steps": 3, **fields}
        )
        return base64.b64decode(answer.data[0].b64_json)

    first = image()
    assert Image.open(io.BytesIO(first)).size == (32, 32)
    assert image() == first != image(seed=8)
    assert ask(server).status_code == 200


def test_refusals_are_http_errors(server):
    assert ask(server, max_tokens=10**6).status_code == 400
    assert ask(server, model="absent").status_code == 404


def test_leaving_clients_free_their_jobs(server):
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body(stream=True, max_tokens=4000), timeout=30
    ) as response:
        lines = response.iter_lines()  # closing it closes the response
        next(lines)
    eventually(lambda: server.metric("tandem_requests_running") == 0)
    eventually(lambda: server.metric("tandem_kv_cache_usage_ratio") == 0)


def test_workers_import_the_files_of_the_driver(server):
    """Hub, gateway and replicas run the package under test, not what lies in the directory it was started from."""
    import serve

    started = [found[1] for line in server.lines if (found := re.search(r"process started .*package=(\S+)", line))]
    assert len(started) >= 5 and set(started) == {str(Path(next(iter(serve.__path__))).resolve())}


def test_only_the_gateway_of_ours_listens_beside_ray(server):
    port = int(server.url.rsplit(":", 1)[1])
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in psutil.Process(server.process.pid).children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", port) in listening
    assert not any("address=tcp:" in line and "address=tcp:127.0.0.1:" not in line for line in server.lines)


def test_killed_replicas_streams_go_on_at_the_other_and_it_is_replaced(server):
    assert len(replicas(server)) == 2
    lines: list[list[str]] = [[] for _ in range(6)]

    def stream(own: list[str]) -> None:
        fields = body(stream=True, max_tokens=300)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=fields, timeout=60) as response:
            prefix = "" if response.status_code == 200 else "data: "
            own.extend(prefix + line for line in response.iter_lines() if (prefix + line).startswith("data: "))

    threads = [threading.Thread(target=stream, args=(own,)) for own in lines]
    victims = replicas(server)
    for victim in victims:
        victim.suspend()
    for thread in threads:
        thread.start()
    eventually(lambda: server.metric("tandem_http_requests_in_flight") >= 6)
    for victim in victims:
        victim.resume()
    victims[0].kill()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert [own[-1] for own in lines] == ["data: [DONE]"] * len(lines)
    assert not any("error" in line for own in lines for line in own)
    eventually(lambda: ask(server).status_code == 200, within_s=60)
    eventually(lambda: len(replicas(server)) == 2 and server.metric("tandem_replicas") == 3, within_s=90)


def test_killed_command_leaves_no_process(server):
    """Last of those that share the server: it ends it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) > 8
    server.process.kill()
    eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in children), within_s=30)


def test_a_model_that_cannot_be_served_is_refused_once_and_in_one_line(tmp_path):
    broken = tiny_folder(tmp_path)
    (broken / "tokenizer.json").write_text("{")
    with launched(str(broken), "--threads", "1") as server:
        assert server.process.wait(timeout=180) == 1
        words = "tokenizer.json is not valid JSON"
        # Ray may still pass on what its processes wrote.
        eventually(lambda: any(line.startswith("tandem: ") and words in line for line in server.lines))
        assert sum("process started" in line for line in server.lines) <= 4  # the command, hub, gateway, one replica


def test_sigterm_while_it_starts_ends_it_too(folder):
    with launched(str(folder), "--threads", "1") as server:
        command = psutil.Process(server.process.pid)
        eventually(lambda: any("raylet" in child.name() for child in command.children()), within_s=60)
        children = command.children(recursive=True)
        assert server.terminate() == 0
        eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in children), within_s=30)


def test_sigterm_leaves_nothing_behind(folder):
    with serving(str(folder), "--served-model-name", "other", "--threads", "1", timeout_s=180) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        assert server.terminate() == 0
        eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in children), within_s=20)
