"""Real spans of a running server, as a collector gets them: a chat, an image, a request whose replica ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from serving import Serving, eventually, serving

from models.embedded.paths import EMBEDDED

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")

from otlp import Collector, Span, collecting

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER, CLIENT = 2, 3
"""OTLP's numbers of a span's kind."""


@pytest.fixture(scope="module")
def collector():
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def server(collector):
    if not (Path(EMBEDDED["tandem-text"]) / "model.safetensors").exists():
        pytest.skip("the embedded models are not here")
    options = ("--no-ray", "--num-replicas", "2", "--threads", "1", "--drain-timeout-s", "0.2")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serving(*options, **environment) as running:
        yield running


def ask(server: Serving, path: str, body: dict, request_id: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers={"x-request-id": request_id, **headers}, timeout=60)


def whole(collector: Collector, request_id: str, names: set[str]) -> Span:
    """The request's root, once spans of all these names have arrived below it."""

    def root() -> Span | None:
        found = collector.root(request_id)
        here = {span.name for span in collector.spans if found is not None and span.trace == found.trace}
        return found if names <= here else None

    return eventually(root, within_s=20)


class Stream(threading.Thread):
    """Reads a streamed answer."""

    def __init__(self, server: Serving, path: str, body: dict, request_id: str) -> None:
        super().__init__(daemon=True)
        self._url, self._body = f"{server.url}{path}", body | {"stream": True}
        self.request_id = request_id
        self.num_events = 0

    def run(self) -> None:
        headers = {"x-request-id": self.request_id}
        with httpx.stream("POST", self._url, json=self._body, headers=headers, timeout=200) as answer:
            for line in answer.iter_lines():
                self.num_events += line.startswith("data: {")


@contextlib.contextmanager
def under_way(server: Serving, path: str, body: dict, name: str) -> Iterator[list[str]]:
    """A streamed request; its id, when its answer has begun."""
    streams = [Stream(server, path, body, f"{name}-{number}") for number in range(1)]
    for stream in streams:
        stream.start()
    eventually(lambda: all(stream.num_events > 2 for stream in streams), within_s=60, every_s=0.01)
    yield [stream.request_id for stream in streams]
    for stream in streams:
        stream.join(timeout=200)
        assert not stream.is_alive()


def busy_replica(server: Serving, model: str, num_jobs: int) -> str:
    """The id of a replica that computes some of so many jobs; all are counted, so its figures are not old ones."""

    def found() -> str | None:
        lines = httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
        running = {
            line.split('process="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("tandem_requests_running") and f'"{model}"' in line
        }
        return max(running, key=running.__getitem__) if sum(running.values()) == num_jobs else None

    return eventually(found, within_s=30, every_s=0.01)


def the_moved(collector: Collector, request_ids: list[str], names: set[str]) -> Span:
    """The root of a request that was at two replicas."""
    roots = [whole(collector, request_id, names) for request_id in request_ids]
    return next(root for root in roots if len(collector.children(root)) == 2)


def both(collector: Collector, root: Span) -> list[Span] | None:
    """The spans of two replicas, when each has one of its job below it."""
    spans = collector.children(root)
    return spans if len(spans) == 2 and all(map(collector.children, spans)) else None


def follow_each_other(spans: list[Span]) -> bool:
    return all(before.start_ns <= before.end_ns <= after.start_ns + 10_000 for before, after in pairwise(spans))


def test_a_chat_is_one_trace_from_its_caller_to_the_decode(server, collector):
    body = {"model": "tandem-text", "messages": [{"role": "user", "content": "What is 27 + 58?"}], "max_tokens": 9}
    body |= {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["nowhere to be found"]}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=opaque"}
    answer = ask(server, "/v1/chat/completions", body, "chat-1", **headers).json()
    root = whole(collector, "chat-1", {"job", "queue", "prefill", "decode", "replica"})
    assert (root.trace, root.parent, root.kind) == (TRACE, PARENT, SERVER)
    assert collector.tree(root) == ["chat tandem-text", ["replica", ["job", "queue", "prefill", "decode"]]]
    [replica] = collector.children(root)
    [job] = collector.children(replica)
    assert replica.kind == CLIENT and root.process == replica.process == "gateway-0"
    assert job.process == replica.attributes["tandem.replica.id"] and job.process.startswith("replica-")
    parts = collector.children(job)
    assert follow_each_other(parts)
    assert (parts[0].start_ns, parts[-1].end_ns) == (job.start_ns, job.end_ns)
    assert root.start_ns <= job.start_ns <= job.end_ns <= root.end_ns
    usage = answer["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tandem",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "tandem-text",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "tandem-text",
        "gen_ai.response.finish_reasons": [answer["choices"][0]["finish_reason"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert {name: root.attributes.get(name) for name in expected} == expected
    assert 0 < root.attributes["gen_ai.response.time_to_first_chunk"] < 60
    assert job.attributes["tandem.num_prompt"] == usage["prompt_tokens"]


def test_an_image_goes_through_its_stages(server, collector):
    body = {"model": "tandem-image", "prompt": "a red circle", "num_inference_steps": 6, "stream": True}
    ask(server, "/v1/images/generations", body | {"partial_images": 1, "seed": 3}, "image-1")
    root = whole(collector, "image-1", {"job", "queue", "encode", "denoise", "decode", "replica"})
    stages = ["queue", "encode", "denoise", "decode", "denoise", "decode"]  # the first decode is the preview's
    assert collector.tree(root) == ["generate_content tandem-image", ["replica", ["job", *stages]]]
    [job] = collector.children(collector.children(root)[0])
    assert follow_each_other(collector.children(job))
    assert root.attributes["gen_ai.output.type"] == "image" and root.attributes["gen_ai.request.seed"] == 3
    assert root.attributes["tandem.usage.denoise_steps"] == 6 and root.attributes["tandem.usage.images"] == 1
    assert job.attributes["tandem.width"] > 0


def test_a_request_that_moves_is_one_trace_with_spans_of_both_replicas(server, collector):
    body = {"model": "tandem-text", "prompt": "the cat", "max_tokens": 1500, "ignore_eos": True}
    with under_way(server, "/v1/completions", body, "moved") as request_ids:
        victim = busy_replica(server, "tandem-text", 1)
        server.children(victim)[-1].terminate()  # its drain is shorter than the request
    moved = the_moved(collector, request_ids, {"replica", "job", "decode"})
    first, second = eventually(lambda: both(collector, moved), within_s=20)
    survivor = {"replica-0-0": "replica-0-1", "replica-0-1": "replica-0-0"}[victim]
    assert first.attributes["tandem.replica.id"] == victim
    assert second.attributes["tandem.replica.id"] == survivor
    assert first.has_failed and first.attributes["error.type"] == "draining"
    assert second.links == [first.id] and not (second.has_failed or moved.has_failed)
    [left], [rest] = collector.children(first), collector.children(second)
    assert (left.process, rest.process) == (victim, survivor)
    assert left.attributes["tandem.finish_reason"] in ("cancelled", "error")
    assert [span.name for span in collector.children(rest)] == ["queue", "prefill", "decode"]
    assert moved.attributes["gen_ai.usage.output_tokens"] == 1500


def test_a_replica_that_is_killed_leaves_the_gateways_span_of_it(server, collector):
    """Its own spans die with it; the trace tells all the same where the request was, and why it went on elsewhere."""
    body = {
        "model": "tandem-image",
        "prompt": "a red circle",
        "num_inference_steps": 250,
        "n": 4,
        "stream_progress": True,
    }
    with under_way(server, "/v1/images/generations", body, "killed") as request_ids:
        victim = busy_replica(server, "tandem-image", 4)
        server.children(victim)[-1].kill()
    root = the_moved(collector, request_ids, {"job", "denoise"})
    first, second = collector.children(root)
    assert (first.attributes["tandem.replica.id"], first.attributes["error.type"]) == (victim, "replica_lost")
    assert second.links == [first.id] and collector.children(first) == [] and collector.children(second)


def test_refusals_tell_their_reason_and_nothing_goes_to_a_replica(server, collector):
    body = {"model": "tandem-text", "prompt": "secret words", "max_tokens": -3}
    assert ask(server, "/v1/completions", body, "refused").status_code == 400
    root = whole(collector, "refused", set())
    assert root.attributes["error.type"] == "invalid_request" and root.attributes["http.response.status_code"] == 400
    assert not root.has_failed and collector.children(root) == [] and root.name == "text_completion"


def test_what_the_caller_does_not_sample_leaves_no_span(server, collector):
    other = "5bf92f3577b34da6a3ce929d0e0e4737"
    body = {"model": "tandem-text", "prompt": "x", "max_tokens": 2}
    ask(server, "/v1/completions", body, "unsampled", traceparent=f"00-{other}-{PARENT}-00")
    ask(server, "/v1/completions", body, "sampled")
    whole(collector, "sampled", {"replica", "job", "decode"})
    assert collector.root("unsampled") is None and other not in {span.trace for span in collector.spans}


def test_no_span_holds_what_was_asked_or_answered(server, collector):
    roots = {"chat tandem-text", "text_completion", "text_completion tandem-text", "generate_content tandem-image"}
    stages = {"replica", "job", "queue", "prefill", "decode", "encode", "denoise"}
    assert {span.name for span in collector.spans} <= roots | stages
    for text in (b"27 + 58", b"red circle", b"secret words", b"nowhere to be found", b"the cat"):
        assert not any(text in body for body in collector.raw)
