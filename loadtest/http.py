"""Closed-loop load over HTTP: so many streams at once, timed chunk by chunk.

    python -m loadtest.http --base-url http://127.0.0.1:8000 --max-concurrency 64 --num-prompts 256

Each request streams, ignores the end token and asks for exactly `--output-len` tokens, so that every run does the same
work. TTFT is from sending the request to the first content; ITL are the gaps between content chunks (a chunk may hold
several tokens when the client is slower than the server); TPOT is (E2E - TTFT) / (tokens - 1). Tokens are the server's
own `usage`, checked against what was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from loadtest.client import HttpError, Server

WORDS = [
    "red",
    "green",
    "blue",
    "seven",
    "apple",
    "river",
    "stone",
    "cloud",
    "paper",
    "light",
    "music",
    "garden",
    "winter",
    "table",
    "window",
    "bread",
]


@dataclass(slots=True)
class Result:
    """One request as its client saw it. Times in seconds."""

    started: float
    ttft: float = 0.0
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str = ""


async def main(arguments: argparse.Namespace) -> dict[str, object]:
    """Run the load and return the report, one JSON-able mapping."""
    server = Server.at(arguments.base_url, arguments.api_key)
    random_source = random.Random(arguments.seed)
    bodies = [make_body(arguments, random_source) for _ in range(arguments.num_prompts)]
    for body in bodies[: arguments.num_warmups]:
        await request(server, body, arguments)
    queue = iter(bodies)
    results: list[Result] = []

    async def client() -> None:
        for body in queue:
            results.append(await request(server, body, arguments))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(arguments.max_concurrency)))
    return _report(arguments, results, time.perf_counter() - began)


def make_body(arguments: argparse.Namespace, random_source: random.Random) -> bytes:
    """A streaming request with a prompt of random words."""
    prompt = " ".join(random_source.choice(WORDS) for _ in range(arguments.input_len))
    fields: dict[str, object] = {
        "model": arguments.model,
        "max_tokens": arguments.output_len,
        "temperature": arguments.temperature,
        "seed": random_source.getrandbits(31),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if arguments.endpoint.endswith("/chat/completions"):
        fields["messages"] = [{"role": "user", "content": prompt}]
    else:
        fields["prompt"] = prompt
    return json.dumps(fields).encode()


async def request(server: Server, body: bytes, arguments: argparse.Namespace, result: Result | None = None) -> Result:
    """Send one and read its answer to the end. Into `result`, where one is given, as it comes: a caller that cancels
    this has what there was."""
    result = result or Result(time.perf_counter())
    try:
        await _read(server, body, arguments, result)
    except (HttpError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        result.error = str(error) if isinstance(error, HttpError) else f"{type(error).__name__}: {error}"
    if not result.error and result.num_tokens != arguments.output_len:
        result.error = f"{result.num_tokens} tokens where {arguments.output_len} were asked"
    return result


async def _read(server: Server, body: bytes, arguments: argparse.Namespace, result: Result) -> None:
    """Note when content came."""
    last = 0.0
    async with aclosing(server.events(arguments.endpoint, body)) as events:
        async for now, event in events:
            if "error" in event:
                result.error = str(event["error"].get("message"))
                return
            if usage := event.get("usage"):
                result.num_tokens = usage["completion_tokens"]
            if any(_says(choice) for choice in event["choices"]):
                if last:
                    result.gaps.append(now - last)
                else:
                    result.ttft = now - result.started
                last = now
    result.e2e = time.perf_counter() - result.started


def _says(choice: dict[str, Any]) -> bool:
    """Whether a chunk brings output: text, reasoning or part of a call."""
    delta = choice.get("delta") or {}
    told = [delta.get(name) for name in ("content", "reasoning_content", "tool_calls")]
    return any(told) or bool(choice.get("text"))


def _report(arguments: argparse.Namespace, results: list[Result], wall: float) -> dict[str, object]:
    good = [result for result in results if not result.error]
    gaps = [gap for result in good for gap in result.gaps]
    tpots = [(result.e2e - result.ttft) / max(1, result.num_tokens - 1) for result in good]
    errors: dict[str, int] = {}
    for result in results:
        if result.error:
            errors[result.error] = errors.get(result.error, 0) + 1
    return {
        "endpoint": arguments.endpoint,
        "max_concurrency": arguments.max_concurrency,
        "completed": len(good),
        "failed": len(results) - len(good),
        "errors": errors,
        "duration_s": round(wall, 3),
        "request_throughput": round(len(good) / wall, 2),
        "output_throughput": round(sum(result.num_tokens for result in good) / wall, 1),
        "ttft_ms": percentiles([result.ttft for result in good]),
        "itl_ms": percentiles(gaps),
        "tpot_ms": percentiles(tpots),
        "e2el_ms": percentiles([result.e2e for result in good]),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, by the nearest rank."""
    ranked = sorted(values)
    if not ranked:
        return {}
    return {f"p{p}": round(1e3 * ranked[min(len(ranked) - 1, len(ranked) * p // 100)], 2) for p in (50, 90, 99)}


def parser() -> argparse.ArgumentParser:
    """The command line; other benchmarks take the same load from it."""
    made = argparse.ArgumentParser(prog="python -m loadtest.http", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--base-url", default="http://127.0.0.1:8000")
    made.add_argument("--endpoint", default="/v1/chat/completions", help="or /v1/completions")
    made.add_argument("--model", default="tandem-text")
    made.add_argument("--api-key", default="")
    made.add_argument("--max-concurrency", type=int, default=64)
    made.add_argument("--num-prompts", type=int, default=256)
    made.add_argument("--num-warmups", type=int, default=2)
    made.add_argument("--input-len", type=int, default=16, help="words of the prompt")
    made.add_argument("--output-len", type=int, default=64, help="tokens of the answer")
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(parser().parse_args()))))
