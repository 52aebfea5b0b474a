"""What Ray costs a request: `tandem serve` with Ray and without, beside Ray Serve's own streaming, in turns.

    python -m loadtest.ray_path [--streams 1,32,128] [--turns 5] [--baseline-turns 2] [--other NAME=URL ...]

Starts all servers on one tiny model with random weights and loads one after the other, again and again, so that what
else the machine does falls on all alike; figures are medians over the turns. CPU is that of the server and all below
it, Ray's own processes too, for 1000 tokens. `--other` names a further OpenAI server that already runs (`vllm serve`).

    gateway to client      the client's time to the first token less the gateway's (means of a round)
    replica to gateway     the gateway's less the engine's queue and prefill: checks, tokenising and routing on the way
                           there, the channel both ways
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from loadtest.client import Server
from loadtest.closed_loop import Round, closed_loop
from loadtest.report import Report
from loadtest.started import ROOT, TANDEM_READY, Started, started, tandem
from models.embedded.paths import EMBEDDED

MODEL = "tiny"
PROMPT_WORDS = 24
WORDS = ("red", "green", "seven", "apple", "river", "stone", "cloud", "paper", "light", "music")
TIMES = {
    "gateway": ("tandem_time_to_first_token_seconds",),
    "engine": ("tandem_request_queue_time_seconds", "tandem_request_prefill_time_seconds"),
}
PUSHED_S = 5.0
"""Within which every process has pushed its counts to the hub; it does so each second."""
IDLE_S = 5.0
LEAST = 30
"""Requests of a round."""


@dataclass(slots=True)
class Target:
    """One way to stream."""

    name: str
    process: Started | None = None
    url: str = ""
    has_metrics: bool = False
    is_baseline: bool = False
    is_handle: bool = False
    rows: list[dict[str, float]] = field(default_factory=list)

    async def round(self, num_streams: int, num_requests: int) -> dict[str, float]:
        if self.is_handle:
            assert self.process is not None
            answer = await asyncio.to_thread(self.process.ask, f"{num_streams} {num_requests}", r"^ROUND (\{.*)", 300.0)
            return json.loads(answer)  # type: ignore[no-any-return]
        server = Server.at(self.url)
        before = await self._times(server) if self.has_metrics else {}
        made = await closed_loop(_Asking(server).stream, num_streams, num_requests)
        row: dict[str, float] = made.as_dict()
        if self.has_metrics:
            row |= _hops(made, before, await self._times(server, before["count"] + num_requests))
        return row

    async def _times(self, server: Server, count: float = 0.0) -> dict[str, float]:
        """Sums of seconds so far, once every request up to number `count` is in them."""
        until = time.monotonic() + PUSHED_S
        while True:
            text = await server.get("/metrics")
            sums = {name: sum(_sample(text, f"{part}_sum") for part in parts) for name, parts in TIMES.items()}
            sums["count"] = min(_sample(text, f"{part}_count") for parts in TIMES.values() for part in parts)
            if sums["count"] >= count or time.monotonic() > until:
                return sums
            await asyncio.sleep(0.1)


class _Asking:
    """Streams of /v1/completions."""

    def __init__(self, server: Server):
        self._server = server

    async def stream(self, number: int, num_tokens: int) -> AsyncGenerator[int]:
        chosen = random.Random(number)
        body = {
            "model": MODEL, "prompt": " ".join(chosen.choice(WORDS) for _ in range(PROMPT_WORDS)), "temperature": 0,
            "max_tokens": num_tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        events = self._server.events("/v1/completions", json.dumps(body).encode())
        async with contextlib.aclosing(events):
            async for _, event in events:
                if "error" in event:
                    raise RuntimeError(f"the server answered {event['error']}")
                if usage := event.get("usage"):
                    yield usage["completion_tokens"]
                else:
                    yield 0


def _hops(made: Round, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    num = after["count"] - before["count"]
    gateway_ms, engine_ms = (1e3 * (after[name] - before[name]) / num for name in ("gateway", "engine"))
    return {"hop_client_ms": made.ttft_mean_ms - gateway_ms, "hop_replica_ms": gateway_ms - engine_ms}


def _sample(text: str, name: str) -> float:
    """The sum of a metric over all processes."""
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))


def write_tiny(folder: Path) -> None:
    """The config and tokenizer of a two-layer model; its weights are drawn at the start (`--load-format dummy`)."""
    source = EMBEDDED["tandem-text"]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    # heads of 32, the smallest that vLLM computes on CPU
    config = {**json.loads((source / "config.json").read_text()), **shape, "num_key_value_heads": 1, "head_dim": 32}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)


@contextlib.contextmanager
def _targets(folder: Path, others: list[str]) -> Iterator[list[Target]]:
    served = (str(folder), "--served-model-name", MODEL, "--load-format", "dummy", "--threads", "1")
    baseline = [sys.executable, "-m", "loadtest.ray_baseline", "--model", str(folder)]
    with contextlib.ExitStack() as stack:
        direct = stack.enter_context(started(tandem(*served, "--no-ray"), TANDEM_READY))
        on_ray = stack.enter_context(started(tandem(*served), TANDEM_READY))
        own = stack.enter_context(
            started(baseline, r"^proxy (\S+)", PYTHONPATH=str(ROOT), RAY_AUTH_MODE="disabled", RAY_DEDUP_LOGS="0")
        )
        yield [
            Target("tandem --no-ray", direct, direct.url, has_metrics=True),
            Target("tandem on Ray", on_ray, on_ray.url, has_metrics=True),
            Target("Serve handle", own, is_handle=True, is_baseline=True),
            Target("Serve proxy", own, own.url, is_baseline=True),
            *(Target(name, None, url, is_baseline=True) for name, _, url in (other.partition("=") for other in others)),
        ]


async def _run(arguments: argparse.Namespace, targets: list[Target], report: Report) -> None:
    for target in targets:
        await target.round(8, 32)  # tokenizers, routers and caches are made at the first requests
    servers = {id(target.process): target for target in targets if target.process is not None}.values()
    idle = [target.process.cpu_s() for target in servers if target.process is not None]
    await asyncio.sleep(IDLE_S)
    for target, before in zip(servers, idle, strict=True):
        assert target.process is not None
        report(kind="idle", target=target.name, cores=(target.process.cpu_s() - before) / IDLE_S)
    for turn in range(arguments.turns):
        now = [target for target in targets if turn < arguments.baseline_turns or not target.is_baseline]
        for num_streams in arguments.streams:
            num_requests = max(LEAST, num_streams * arguments.requests_per_stream)
            for target in now if turn % 2 == 0 else reversed(now):
                row = await _watched(target, num_streams, num_requests)
                target.rows.append(row)
                report(kind="round", target=target.name, turn=turn, **row)


async def _watched(target: Target, num_streams: int, num_requests: int) -> dict[str, float]:
    """A round, and the CPU time of its server meanwhile."""
    before = target.process.cpu_s() if target.process is not None else 0.0
    row = await target.round(num_streams, num_requests)
    if target.process is not None:
        row["cpu_ms_per_1000_tokens"] = 1e6 * (target.process.cpu_s() - before) / row["num_tokens"]
    return row


def table(targets: list[Target], streams: list[int]) -> str:
    """Medians over turns, as a page shows them. Ratios and differences are medians over the turns' own."""
    columns = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "hop_client_ms", "hop_replica_ms",
               "cpu_ms_per_1000_tokens")  # fmt: skip
    lines = [
        "| streams | | tokens/s | to --no-ray | TTFT p50 ms | less --no-ray | TTFT p99 ms | client hop ms "
        "| replica hop ms | CPU ms / 1000 tokens |",
        "|" + "---|" * 10,
    ]
    for num_streams in streams:
        first: list[dict[str, float]] = []
        for target in targets:
            rows = [row for row in target.rows if row["num_streams"] == num_streams]
            if not rows:
                continue
            first = first or rows
            pairs = list(zip(rows, first))
            ratio = median(row["tokens_per_s"] / base["tokens_per_s"] for row, base in pairs)
            later = median(row["ttft_p50_ms"] - base["ttft_p50_ms"] for row, base in pairs)
            cells = [_shown(rows, column) for column in columns]
            cells[1:1] = [f"{ratio:.2f}"]
            cells[3:3] = [f"{later:+.1f}"]
            lines.append(f"| {num_streams} | {target.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(rows: list[dict[str, float]], column: str) -> str:
    values = [row[column] for row in rows if column in row]
    if not values:
        return ""
    middle = median(values)
    return f"{middle:.0f}" if middle >= 100 else f"{middle:.2f}" if middle < 1 else f"{middle:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.ray_path", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=lambda text: [int(word) for word in text.split(",")], default=[1, 32, 128])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--baseline-turns", type=int, default=2, help="turns that Serve's own and others take part in")
    parser.add_argument("--requests-per-stream", type=int, default=4)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL", help="serves the model as 'tiny'")
    parser.add_argument("--model-folder", help="write the tiny model here and keep it, for a server of --other")
    parser.add_argument("--output", help="append the rows to this file, as JSON lines")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers it started end with it
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.model_folder or temporary)
        folder.mkdir(exist_ok=True)
        write_tiny(folder)
        with _targets(folder, arguments.other) as targets:
            asyncio.run(_run(arguments, targets, Report(arguments.output)))
            print(table(targets, arguments.streams))
            print(f"{os.cpu_count()} cores, {arguments.turns} turns")


if __name__ == "__main__":
    main()
