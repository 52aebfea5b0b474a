"""Closed-loop load over HTTP: so many streams at once, timed chunk by chunk.

    python -m loadtest.http --base-url http://127.0.0.1:8000 --max-concurrency 64 --num-prompts 256

Each request streams, ignores the end token and asks for exactly `--output-len` tokens, so that every run does the same
work. TTFT is from sending the request to the first content; ITL are the gaps between content chunks (a chunk may hold
several tokens when the client is slower than the server); TPOT is (E2E - TTFT) / (tokens - 1). Tokens are the server's
own `usage`, checked against what was asked. The client speaks HTTP/1.1 on plain sockets, because it shares the cores
with the server when both run on one machine: what a client library costs would be counted as the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

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
    url = urlsplit(arguments.base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    random_source = random.Random(arguments.seed)
    bodies = [_body(arguments, random_source) for _ in range(arguments.num_prompts)]
    for body in bodies[: arguments.num_warmups]:
        await _request(host, port, body, arguments)
    queue = iter(bodies)
    results: list[Result] = []

    async def client() -> None:
        for body in queue:
            results.append(await _request(host, port, body, arguments))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(arguments.max_concurrency)))
    return _report(arguments, results, time.perf_counter() - began)


def _body(arguments: argparse.Namespace, random_source: random.Random) -> bytes:
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


async def _request(host: str, port: int, body: bytes, arguments: argparse.Namespace) -> Result:
    result = Result(time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        result.error = f"connect: {error.strerror or error}"
        return result
    key = f"Authorization: Bearer {arguments.api_key}\r\n" if arguments.api_key else ""
    head = (
        f"POST {arguments.endpoint} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{key}Connection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        await _read(reader, result)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        result.error = result.error or f"{type(error).__name__}: {error}"
    finally:
        writer.close()
    if not result.error and result.num_tokens != arguments.output_len:
        result.error = f"{result.num_tokens} tokens where {arguments.output_len} were asked"
    return result


async def _read(reader: asyncio.StreamReader, result: Result) -> None:
    """Read one streamed response to its end, noting when content came."""
    status = await reader.readline()
    if b" 200 " not in status:
        rest = await reader.read(65536)
        result.error = f"{status.decode('latin-1').strip()}: {rest[-300:].decode('utf-8', 'replace')}"
        return
    while (await reader.readline()).strip():
        pass
    last = 0.0
    while line := await reader.readline():  # chunk sizes and blank lines between events are skipped as non-data
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        now = time.perf_counter()
        event = json.loads(line[6:])
        if "error" in event:
            result.error = str(event["error"].get("message"))
            return
        if usage := event.get("usage"):
            result.num_tokens = usage["completion_tokens"]
        if any((choice.get("delta") or {}).get("content") or choice.get("text") for choice in event["choices"]):
            if last:
                result.gaps.append(now - last)
            else:
                result.ttft = now - result.started
            last = now
    result.e2e = time.perf_counter() - result.started


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
        "ttft_ms": _percentiles([result.ttft for result in good]),
        "itl_ms": _percentiles(gaps),
        "tpot_ms": _percentiles(tpots),
        "e2el_ms": _percentiles([result.e2e for result in good]),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, by the nearest rank."""
    ranked = sorted(values)
    if not ranked:
        return {}
    return {f"p{p}": round(1e3 * ranked[min(len(ranked) - 1, len(ranked) * p // 100)], 2) for p in (50, 90, 99)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.http", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--endpoint", default="/v1/chat/completions", help="or /v1/completions")
    parser.add_argument("--model", default="tandem-text")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--max-concurrency", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--num-warmups", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=16, help="words of the prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(_parser().parse_args()))))
