"""`tandem serve --no-ray` from outside: real processes, real HTTP, the real `openai` client, real kills."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from serving import Serving, eventually, serving
from tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Slow for its size, with room for long answers: whoever looks at a running request finds it running."""
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", num_hidden_layers=16, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny") as running:
        yield running


def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: Serving, **fields):
    messages = [{"role": "user", "content": "the red fox"}]
    fields = {"messages": messages, "max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}, **fields}
    return client(server).chat.completions.create(model="tiny", **fields)


def test_streamed_and_whole_answers_are_equal(server):
    whole = ask(server)
    assert whole.usage.completion_tokens == 16 and whole.choices[0].finish_reason == "length"
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 16


def test_the_models_list_names_what_is_served(server):
    assert [model.id for model in client(server).models.list()] == ["tiny"]


def test_start_up_tells_address_and_model(server):
    text = "\n".join(server.lines)
    assert "M parameters" in text and "KV cache" in text and "cpu float32" in text


def test_leaving_clients_free_their_jobs(server):
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body(max_tokens=4000), timeout=30) as response:
        lines = response.iter_lines()  # closing it closes the response
        next(lines)
        eventually(lambda: server.metric("tandem_requests_running") >= 1)
    eventually(lambda: server.metric("tandem_requests_running") == 0)
    eventually(lambda: server.metric("tandem_kv_cache_usage_ratio") == 0)


def body(**fields):
    message = {"role": "user", "content": "the red fox"}
    return {"model": "tiny", "messages": [message], "stream": True, "ignore_eos": True, "max_tokens": 300, **fields}


def sse(server: Serving, lines: list[str], **fields) -> None:
    """Collect the data lines of one streamed request, to its end however it comes."""
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body(**fields), timeout=60) as response:
            prefix = "" if response.status_code == 200 else "data: "  # refused, or lost before the first token
            lines.extend(prefix + line for line in response.iter_lines() if (prefix + line).startswith("data: "))
    except httpx.HTTPError as error:
        lines.append(f"broken {type(error).__name__}")


def test_streams_of_the_only_replica_wait_for_it_to_be_started_again(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny") as server:
        lines: list[list[str]] = [[] for _ in range(4)]
        threads = [threading.Thread(target=sse, args=(server, own), kwargs={"max_tokens": 200}) for own in lines]
        [replica] = server.children("replica-0-0")
        replica.suspend()  # so that the streams are surely unfinished when it dies
        for thread in threads:
            thread.start()
        eventually(lambda: server.metric("tandem_http_requests_in_flight") >= 4)
        replica.resume()
        eventually(lambda: server.metric("tandem_requests_running") >= 1, every_s=0.01)
        replica.kill()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert [own[-1] for own in lines] == ["data: [DONE]"] * 4
        assert not any("error" in line for own in lines for line in own)
        assert server.metric("tandem_failovers_total") >= 1


def test_killed_gateway_frees_its_jobs_and_comes_back(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny") as server:
        port = server.url.rsplit(":", 1)[1]
        lines: list[str] = []
        thread = threading.Thread(target=sse, args=(server, lines), kwargs={"max_tokens": 4000})
        thread.start()
        eventually(lambda: server.metric("tandem_requests_running") >= 1, every_s=0.01)
        [gateway] = server.children("gateway-0")
        gateway.kill()
        thread.join(timeout=20)
        assert not thread.is_alive()

        def is_back() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        eventually(is_back, within_s=30)
        eventually(lambda: server.metric("tandem_requests_running") == 0)


def test_sigterm_lets_running_requests_end_and_exits_zero(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny") as server:
        lines: list[str] = []
        thread = threading.Thread(target=sse, args=(server, lines), kwargs={"max_tokens": 800})
        thread.start()
        eventually(lambda: server.metric("tandem_requests_running") >= 1, every_s=0.01)
        children = server.children()
        assert server.terminate() == 0
        thread.join(timeout=10)
        assert lines[-1] == "data: [DONE]"
        assert not any(process.is_running() for process in children)


def test_a_second_signal_exits_now(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny") as server:
        [replica] = server.children("replica-0-0")
        threading.Thread(target=sse, args=(server, []), kwargs={"max_tokens": 4000}, daemon=True).start()
        eventually(lambda: server.metric("tandem_http_requests_in_flight") >= 1, every_s=0.01)
        replica.suspend()  # the drain cannot end
        children = server.children()
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: any("stopping" in line for line in server.lines))
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) == 128 + signal.SIGINT
        eventually(lambda: not any(process.is_running() and process.status() != "zombie" for process in children))


def test_children_end_with_a_killed_parent(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny") as server:
        children = server.children()
        assert len(children) == 2
        [sockets] = {Path(found[1]) for line in server.lines if (found := re.search(r"address=unix:(\S+)/", line))}
        assert sockets.is_dir()
        server.process.kill()
        eventually(lambda: not any(process.is_running() and process.status() != "zombie" for process in children))
        eventually(lambda: not sockets.exists())


def test_files_of_the_working_directory_are_never_imported(folder, tmp_path):
    for trap in ("serve.py", "models/__init__.py", "request.py", "loadtest.py"):
        (tmp_path / trap).parent.mkdir(exist_ok=True)
        (tmp_path / trap).write_text("raise SystemExit('imported from the working directory')\n")
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "tiny", cwd=tmp_path) as server:
        assert ask(server).usage.completion_tokens == 16


def test_two_servers_do_not_meet(server, folder):
    with serving(str(folder), "--no-ray", "--threads", "1", "--served-model-name", "other") as second:
        assert [model.id for model in client(second).models.list()] == ["other"]
        assert [model.id for model in client(server).models.list()] == ["tiny"]


def test_a_busy_port_is_refused_with_the_remedy(server, folder):
    port = server.url.rsplit(":", 1)[1]
    with (
        pytest.raises(AssertionError, match=f"(?s){port}.*--port"),
        serving(str(folder), "--no-ray", "--threads", "1", "--host", "127.0.0.1", "--port", port),
    ):
        pass


def test_nothing_listens_beyond_loopback(server):
    own = [server.process.pid, *(process.pid for process in server.children())]
    import psutil

    addresses = {
        connection.laddr.ip
        for pid in own
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_no_secret_is_on_a_command_line(server):
    for process in server.children():
        assert len(" ".join(process.cmdline())) < 400 + len(os.getcwd())


def test_processes_that_load_models_do_not_inherit_the_key(folder):
    with serving(str(folder), "--no-ray", "--threads", "1", TANDEM_API_KEY="a-secret") as running:
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        answer = httpx.get(f"{running.url}/v1/models", headers={"Authorization": "Bearer a-secret"})
        assert answer.status_code == 200
        children = psutil.Process(running.process.pid).children(recursive=True)
        assert len(children) >= 2 and not any("a-secret" in child.environ().values() for child in children)
