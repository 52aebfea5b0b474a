"""Ray Serve's own ways to stream, with the engine that Tandem serves: what `loadtest.ray_path` compares with.

    handle   the driver reads `handle.options(stream=True).stream.remote(...)`: one item a step, as object references
    proxy    client ── Serve's HTTP proxy ── ingress replica ── handle ── engine replica, as `ray.serve.llm` is built

Started as a process of its own (`--model FOLDER`); says where the proxy listens, then answers a line `STREAMS REQUESTS`
on standard input with a round over the handle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse

from loadtest.closed_loop import closed_loop
from serve.events import TokenDelta
from serve.options import ModelOptions
from serve.recorder import EngineObserver, Recorder
from serve.replica import build, end_process
from serve.request import SamplingParams, TextRequest
from serve.text.tokenizer import Tokenizer, TokenizerBundle

MAX_ONGOING = 1024


@ray_serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0.25})
class Engine:
    """The engine, its steps as items of a stream."""

    def __init__(self, options: ModelOptions) -> None:
        observer = EngineObserver(Recorder("baseline", "replica"), options.name)
        self._served = build(options, observer, lambda error: end_process(1))

    def files(self) -> dict[str, bytes]:
        return self._served.bundle

    async def stream(self, request: TextRequest) -> AsyncGenerator[tuple[int, ...]]:
        async with aclosing(await self._served.backend.submit(request)) as pieces:
            async for events in pieces:
                token_ids = tuple(token for e in events if isinstance(e, TokenDelta) for token in e.token_ids)
                if token_ids:
                    yield token_ids


@ray_serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0.25})
class Ingress:
    """/v1/completions, as much of it as the benchmark asks."""

    async def __init__(self, engine: DeploymentHandle) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._tokenizer = Tokenizer(TokenizerBundle(await engine.files.remote()))
        self._engine = engine.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        fields = await request.json()
        asked = text_request(tuple(self._tokenizer.encode(fields["prompt"])), fields["max_tokens"])
        return StreamingResponse(self._events(asked), media_type="text/event-stream")

    async def _events(self, asked: TextRequest) -> AsyncGenerator[str]:
        detokenizer, num_tokens = self._tokenizer.detokenizer(), 0
        async for token_ids in self._engine.stream.remote(asked):
            num_tokens += len(token_ids)
            yield _event([{"index": 0, "text": detokenizer.push(token_ids), "finish_reason": None}])
        yield _event([], {"completion_tokens": num_tokens})
        yield "data: [DONE]\n\n"


def _event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
    fields = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "tiny", "choices": choices}
    return f"data: {json.dumps({**fields, 'usage': usage})}\n\n"


def text_request(prompt_token_ids: tuple[int, ...], num_tokens: int) -> TextRequest:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return TextRequest(request_id="r", model="tiny", prompt_token_ids=prompt_token_ids, sampling=sampling)


async def _over_handle(engine: DeploymentHandle, num_streams: int, num_requests: int) -> dict[str, float]:
    streaming = engine.options(stream=True)

    async def stream(number: int, num_tokens: int) -> AsyncGenerator[int]:
        prompt = tuple(1 + (number * 31 + place * 7) % 500 for place in range(24))
        async for token_ids in streaming.stream.remote(text_request(prompt, num_tokens)):
            yield len(token_ids)

    return (await closed_loop(stream, num_streams, num_requests)).as_dict()


async def _answer_lines(engine: DeploymentHandle) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        num_streams, num_requests = map(int, line.split())
        print("ROUND", json.dumps(await _over_handle(engine, num_streams, num_requests)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.ray_baseline")
    parser.add_argument("--model", required=True)
    options = ModelOptions(model=parser.parse_args().model, served_model_name=("tiny",), load_format="dummy", threads=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING")
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    engine = Engine.bind(options)
    ray_serve.run(Ingress.bind(engine), route_prefix="/", logging_config={"enable_access_log": False})
    print(f"proxy http://127.0.0.1:{port}", flush=True)
    try:
        asyncio.run(_answer_lines(ray_serve.get_deployment_handle("Engine", "default")))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # The classes must be those of the importable module, not of __main__: Ray's workers load them by name.
    from loadtest.ray_baseline import main as imported_main

    imported_main()
