"""Where requests go: the gateway's rule against others, on four paced replicas (`loadtest/paced.py`).

    python -m loadtest.routing chat [--seeds 2] [--sessions 96] [--turns 6]
    python -m loadtest.routing images [--seeds 2] [--seconds 30] [--load 0.8]

One process holds the replicas; pool, channel, schedulers and KV caches are the served ones, the devices' time is slept.

chat     sessions of several turns: a system prompt of 1024 tokens, one of eight and half of the sessions with the
         first of them; each turn adds 64 to 448 tokens, asks for 64, and sends the whole conversation again after a
         pause of 1 s on average. A cache has room for a third of what all sessions hold at their end.
images   sides of 256, 512 and 1024 pixels, 80, 15 and 5 of 100, arriving at random at a share of the capacity.

One row a rule and seed. TTFT and latency are a client's, from submitting on. `slowdown`: latency over that of the same
image alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import Any

from loadtest.paced import ImageDevice, TextDevice, image_replica, text_replica
from loadtest.report import Report
from loadtest.routing_rules import FewestRequests, RoundRobin, TwoChoices
from serve.backend import Backend
from serve.channel import ChannelClient
from serve.channel_server import ChannelServer
from serve.events import Finished, TokenDelta
from serve.gateway.pool import Pool
from serve.gateway.routing import Router
from serve.request import ImageRequest, SamplingParams, TextRequest
from serve.text.prefix_digest import PrefixDigest
from serve.wire import ReplicaEntry

NUM_REPLICAS = 4
TEXT_DEVICE = TextDevice(base_s=0.020, row_s=0.0002, unit_s=0.0002, kv_cache_tokens=81_920)
"""About an 8B model on a small GPU: 5000 prompt tokens/s, 20 ms a decode step."""
IMAGE_DEVICE = ImageDevice(base_s=0.002, token_s=2e-5)
NUM_STEPS = 20
SIDES, SHARES = (256, 512, 1024), (80, 15, 5)
RULES: dict[str, Callable[[], Router]] = {
    "round robin": RoundRobin,
    "two choices": TwoChoices,
    "fewest requests": FewestRequests,
    "backlog seconds": Router,
}
Replica = tuple[Backend, PrefixDigest | None]


@dataclass(slots=True)
class Seen:
    """What the clients of one run saw."""

    ttft_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    slowdown: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_cached: int = 0


@asynccontextmanager
async def gateway(router: Router, make: Callable[[], Replica]) -> AsyncIterator[Pool]:
    """A pool over `NUM_REPLICAS` new replicas, connected."""
    secret, all_here, num_here = secrets.token_bytes(32), asyncio.Event(), 0

    async def connect(entry: ReplicaEntry, on_lost: Callable[[], None]) -> ChannelClient:
        nonlocal num_here
        client = await ChannelClient.connect(entry.address, secret=secret, gateway_id="loadtest", on_lost=on_lost)
        num_here += 1
        if num_here == NUM_REPLICAS:
            all_here.set()
        return client

    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        entries = []
        for number in range(NUM_REPLICAS):
            backend, digest = make()
            stack.push_async_callback(backend.aclose)
            name = f"replica-{number}"
            server = ChannelServer(backend, {}, secret=secret, replica_id=name, digest=digest)
            stack.push_async_callback(server.aclose)
            address = await server.start(f"unix:{folder}/{name}")
            entries.append(ReplicaEntry(name, "paced", backend.card.kind, address))
        pool = Pool(connect, router)
        stack.push_async_callback(pool.aclose)
        pool.update(entries)
        await all_here.wait()
        await pool.meet(["paced"])
        yield pool


# -- chat --------------------------------------------------------------------------------------------------------------


async def chat(pool: Pool, seed: int, num_sessions: int, num_turns: int) -> Seen:
    draw, seen = random.Random(seed), Seen()
    systems = [_ids(draw, 1024) for _ in range(8)]
    weights = [7, *[1] * 7]
    sessions = [
        _session(pool, seen, random.Random(draw.random()), draw.choices(systems, weights)[0], num_turns)
        for _ in range(num_sessions)
    ]
    await asyncio.gather(*sessions)
    return seen


async def _session(pool: Pool, seen: Seen, draw: random.Random, system: list[int], num_turns: int) -> None:
    prompt = list(system)
    await asyncio.sleep(draw.uniform(0, 10))
    for turn in range(num_turns):
        if turn:
            await asyncio.sleep(draw.expovariate(1.0))
        prompt += _ids(draw, draw.randint(64, 448))
        request = TextRequest(
            request_id=secrets.token_hex(8),
            model="paced",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True),
        )
        prompt += await _answer(pool, seen, request)


async def _answer(pool: Pool, seen: Seen, request: TextRequest) -> list[int]:
    began = time.perf_counter()
    output: list[int] = []
    async with aclosing(await pool.submit(request)) as stream:
        async for events in stream:
            for event in events:
                if isinstance(event, TokenDelta):
                    if not output:
                        seen.ttft_s.append(time.perf_counter() - began)
                    output += event.token_ids
                elif isinstance(event, Finished):
                    seen.num_prompt += event.usage.prompt_tokens
                    seen.num_cached += event.usage.cached_tokens
    seen.latency_s.append(time.perf_counter() - began)
    return output


def _ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(2, 32_000) for _ in range(count)]


# -- images ------------------------------------------------------------------------------------------------------------


async def images(pool: Pool, seed: int, seconds: float, load: float) -> Seen:
    seen = Seen()
    async with asyncio.TaskGroup() as group:
        began = time.perf_counter()
        for at, side in _arrivals(seed, seconds, load):
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            group.create_task(_draw_image(pool, seen, side))
    return seen


def _arrivals(seed: int, seconds: float, load: float) -> Iterator[tuple[float, int]]:
    """(time, side), so many that the devices are busy for a share of `load` of the time."""
    draw, at = random.Random(seed), 0.0
    mean_s = sum(share * _alone_s(side) for side, share in zip(SIDES, SHARES)) / sum(SHARES)
    while (at := at + draw.expovariate(load * NUM_REPLICAS / mean_s)) < seconds:
        yield at, draw.choices(SIDES, SHARES)[0]


def _alone_s(side: int) -> float:
    return NUM_STEPS * (IMAGE_DEVICE.base_s + IMAGE_DEVICE.token_s * side**2 / 256) + 2 * IMAGE_DEVICE.base_s


async def _draw_image(pool: Pool, seen: Seen, side: int) -> None:
    request = ImageRequest(
        request_id=secrets.token_hex(8), model="paced", prompt="x", width=side, height=side,
        num_inference_steps=NUM_STEPS, guidance_scale=1.0, solver="euler", seed=0,
    )  # fmt: skip
    began = time.perf_counter()
    async with aclosing(await pool.submit(request)) as stream:
        async for _ in stream:
            pass
    seen.latency_s.append(time.perf_counter() - began)
    seen.slowdown.append(seen.latency_s[-1] / _alone_s(side))


# -- the command -------------------------------------------------------------------------------------------------------


def row(seen: Seen) -> dict[str, Any]:
    figures: dict[str, Any] = {"requests": len(seen.latency_s)}
    if seen.num_prompt:
        figures["hit_rate"] = seen.num_cached / seen.num_prompt
    for name, values in (("ttft_s", seen.ttft_s), ("latency_s", seen.latency_s), ("slowdown", seen.slowdown)):
        if len(values) > 1:
            cuts = quantiles(values, n=100, method="inclusive")
            figures |= {f"{name}_mean": fmean(values), f"{name}_p50": cuts[49], f"{name}_p99": cuts[98]}
    return figures


async def main() -> None:
    args = _parser().parse_args()
    report = Report(args.out)
    for seed in range(args.seeds):
        for name in args.rule or RULES:
            began = time.perf_counter()
            if args.workload == "chat":
                async with gateway(RULES[name](), lambda: text_replica(TEXT_DEVICE)) as pool:
                    seen = await chat(pool, seed, args.sessions, args.turns)
            else:
                async with gateway(RULES[name](), lambda: (image_replica(IMAGE_DEVICE), None)) as pool:
                    seen = await images(pool, seed, args.seconds, args.load)
            wall_s = time.perf_counter() - began
            report(benchmark="routing", workload=args.workload, rule=name, seed=seed, wall_s=wall_s, **row(seen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.routing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("workload", choices=("chat", "images"))
    parser.add_argument("--rule", action="append", choices=[*RULES], help="only this one; any number of times")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sessions", type=int, default=96)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=30.0, help="of image arrivals")
    parser.add_argument("--load", type=float, default=0.8, help="of image arrivals, as a share of the capacity")
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    return parser


if __name__ == "__main__":
    asyncio.run(main())
