"""A step of load on Ray Serve: replicas come and go by `serve/autoscaling.py`, and what clients see of it.

    python -m loadtest.autoscaling --page timeline.html [--rate 3 --step-rate 15] [--max-wait 4] [--from-zero]

A local Ray, `tandem serve`'s own hub, gateway and channel; replicas that are paced (`loadtest/paced.py`): scheduler, KV
cache and engine are real, the device's time and that of loading weights are slept. Streaming completions arrive over
HTTP at random (Poisson) at one rate, then at another, then at the first again. A client that is refused comes again
when it was told to; everything else than a whole answer is a failure.

One RESULT line, and a page with the timeline. Exit status 1 if any request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.client import HttpError, Server
from loadtest.paced import TextDevice
from loadtest.paced_serving import PacedModel
from loadtest.page.chart import Chart, Line, Mark
from loadtest.report import Report
from serve.deployments.run import RayApplication
from serve.options import AutoscalingOptions, GatewayOptions, ModelOptions, ServeOptions

DEVICE = TextDevice(base_s=0.020, row_s=0.0002, unit_s=0.0002, kv_cache_tokens=81_920)
"""About an 8B model on a small GPU: 5000 prompt tokens/s, 20 ms a decode step."""
NUM_PROMPT, NUM_OUTPUT = 512, 48
"""Tokens: 0.11 s of a device's time that no other request can have."""
MODEL = "paced"
SAMPLE_S = 0.5
DRAIN_S = 20.0
STYLE = Path(__file__).parent / "page" / "style.css"


@dataclass(slots=True)
class Seen:
    """A request, as its client saw it. Times since the load began."""

    began: float
    first: float | None = None
    ended: float | None = None
    refusals: list[tuple[float, float]] = field(default_factory=list)
    """When, and after how long it was told to come again."""
    failure: str = ""

    @property
    def ttft_s(self) -> float:
        """From its first try on."""
        return (self.first or self.began) - self.began


@dataclass(slots=True)
class Timeline:
    """What was sampled beside the requests."""

    requests: list[Seen] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    """Each with `at`, `ready`, `loading`, `desired` and `held`."""
    ups: int = 0
    downs: int = 0

    def in_flight(self, at: float) -> int:
        return sum(one.began <= at and (one.ended is None or at < one.ended) for one in self.requests)


# -- the load ----------------------------------------------------------------------------------------------------------


async def drive(server: Server, phases: list[tuple[float, float]], seed: int) -> Timeline:
    """Send what the phases (seconds, requests a second) ask for; return when the last answer has ended."""
    timeline, draw, began = Timeline(), random.Random(seed), time.monotonic()
    watching = asyncio.create_task(_watch(server, timeline, began))
    async with asyncio.TaskGroup() as group:
        for at in _arrivals(draw, phases):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            prompt = [draw.randrange(10, 1000) for _ in range(NUM_PROMPT)]
            timeline.requests.append(Seen(time.monotonic() - began))
            group.create_task(_ask(server, timeline.requests[-1], prompt, began))
        await asyncio.sleep(max(0.0, began + sum(duration for duration, _ in phases) - time.monotonic()))
    watching.cancel()
    return timeline


def _arrivals(draw: random.Random, phases: list[tuple[float, float]]) -> Iterator[float]:
    start = 0.0
    for duration, rate in phases:
        at = start
        while rate and (at := at + draw.expovariate(rate)) < start + duration:
            yield at
        start += duration


async def _ask(server: Server, seen: Seen, prompt: list[int], began: float) -> None:
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": NUM_OUTPUT, "temperature": 0, "ignore_eos": True}
    body = json.dumps(fields | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    while True:
        try:
            num_output = 0
            async with aclosing(server.events("/v1/completions", body)) as events:
                async for at, event in events:
                    if "error" in event:
                        raise HttpError(event["error"]["message"], 200)
                    if seen.first is None:
                        seen.first = at - (time.perf_counter() - (time.monotonic() - began))
                    if event.get("usage"):
                        num_output = event["usage"]["completion_tokens"]
            if num_output != NUM_OUTPUT:
                seen.failure = f"{num_output} tokens of {NUM_OUTPUT}"
        except HttpError as error:
            if error.retry_after and error.status in (429, 503):
                seen.refusals.append((time.monotonic() - began, float(error.retry_after)))
                await asyncio.sleep(float(error.retry_after))
                continue
            seen.failure = f"{error.status} {error}"
        seen.ended = time.monotonic() - began
        return


async def _watch(server: Server, timeline: Timeline, began: float) -> None:
    """Sample the metrics."""
    while True:
        text = await server.get("/metrics")
        timeline.samples.append(
            {
                "at": time.monotonic() - began,
                "ready": _metric(text, "tandem_replicas"),
                "loading": _metric(text, "tandem_replicas_loading"),
                "desired": _metric(text, "tandem_replicas_desired"),
                "held": _metric(text, "tandem_requests_held"),
            }
        )
        timeline.ups = int(_metric(text, "tandem_scaling_events_total", direction="up"))
        timeline.downs = int(_metric(text, "tandem_scaling_events_total", direction="down"))
        await asyncio.sleep(SAMPLE_S)


def _metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's series for the model."""
    labels["model"] = MODEL
    found = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for told, value in found if all(f'{key}="{one}"' in told for key, one in labels.items()))


# -- what came of it ---------------------------------------------------------------------------------------------------


def row(timeline: Timeline) -> dict[str, Any]:
    """The figures of a run."""
    waits = sorted(one.ttft_s for one in timeline.requests if not one.failure)
    refused = [one for one in timeline.requests if one.refusals]
    figures: dict[str, Any] = {
        "requests": len(timeline.requests),
        "failed": sum(bool(one.failure) for one in timeline.requests),
        "refused_once_or_more": len(refused),
        "refusals": sum(len(one.refusals) for one in refused),
        "replicas_most": max(sample["ready"] for sample in timeline.samples),
        "replicas_last": timeline.samples[-1]["ready"],
        "scaled_up": timeline.ups,
        "scaled_down": timeline.downs,
    }
    if waits:
        figures |= {f"ttft_s_p{p}": waits[min(len(waits) - 1, len(waits) * p // 100)] for p in (50, 90, 99)}
    return figures


def page(timeline: Timeline, phases: list[tuple[float, float]], words: str) -> str:
    """A self-contained page: replicas, requests and waits over the same seconds."""
    end = max(sample["at"] for sample in timeline.samples)
    steps = [sum(duration for duration, _ in phases[:number]) for number in range(1, len(phases))]
    marks = [Mark(0.0, ""), *(Mark(at, f"{rate:g}/s") for at, (_, rate) in zip(steps, phases[1:])), Mark(end, "")]
    ticks = [number * SAMPLE_S for number in range(int(end / SAMPLE_S) + 1)]
    refusals = sorted(at for one in timeline.requests for at, _ in one.refusals)
    shared: dict[str, Any] = {"x_label": "seconds", "x_marks": marks, "is_wide": True, "y_is_log": False}

    def sampled(name: str) -> list[tuple[float, float]]:
        return [(sample["at"], sample[name]) for sample in timeline.samples]

    charts = [
        Chart(
            title="Replicas",
            y_label="replicas",
            lines=[
                Line("asked for", _stairs(sampled("desired")), 1, is_dashed=True),
                Line("up", _stairs(sampled("ready"))),
            ],
            **shared,
        ),
        Chart(
            title="Requests in flight",
            y_label="requests",
            lines=[
                Line("in flight, with those that wait to come again", [(at, timeline.in_flight(at)) for at in ticks]),
                Line("refused so far", [(at, sum(one <= at for one in refusals)) for at in ticks], "bad"),
            ],
            **shared,
        ),
        Chart(
            title="Time to the first token, of the arrivals of a second",
            y_label="seconds",
            lines=[Line("longest", _by_second(timeline, max), 1), Line("median", _by_second(timeline, median))],
            note="A client that was refused counts from its first try on.",
            **shared,
        ),
    ]
    style = STYLE.read_text(encoding="utf-8")
    drawn = "".join(chart.svg() for chart in charts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Autoscaling</title><style>{style}</style>'
        f'<main><h1>Replicas under a step of load</h1><p>{words}</p><div class="charts">{drawn}</div></main></html>'
    )


def _by_second(timeline: Timeline, choose: Callable[[list[float]], float]) -> list[tuple[float, float]]:
    waits: dict[int, list[float]] = {}
    for one in timeline.requests:
        if one.first is not None:
            waits.setdefault(int(one.began), []).append(one.ttft_s)
    return [(second + 0.5, choose(waits[second])) for second in sorted(waits)]


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A number stays what it is until it changes."""
    stairs = points[:1]
    for before, after in pairwise(points):
        stairs += [(after[0], before[1]), after]
    return stairs


# -- the command -------------------------------------------------------------------------------------------------------


async def run(args: argparse.Namespace) -> Timeline:
    scaling = AutoscalingOptions(
        min_replicas=0 if args.from_zero else 1,
        max_replicas=args.max_replicas,
        target_wait_s=args.target_wait,
        look_back_period_s=args.look_back,
        upscale_delay_s=args.upscale_delay,
        downscale_delay_s=args.downscale_delay,
    )
    model = ModelOptions(model="tandem-text", served_model_name=(MODEL,), num_cpus=0.1, autoscaling_config=scaling)
    gateway = GatewayOptions(port=0, max_wait_s=args.max_wait, drain_timeout_s=DRAIN_S)
    application = RayApplication(
        ServeOptions(models=(model,), gateway=gateway), build=PacedModel(DEVICE, args.load_time)
    )
    try:
        server = Server.at(await application.start())
        if args.from_zero:
            await _until_asleep(server)
        print("the load begins", flush=True)
        timeline = await drive(server, phases(args), args.seed)
        print("the load has ended", flush=True)
        server.close()
        await application.drain(DRAIN_S)
    finally:
        application.kill()
    return timeline


async def _until_asleep(server: Server) -> None:
    while _metric(await server.get("/metrics"), "tandem_replicas"):
        await asyncio.sleep(SAMPLE_S)


def phases(args: argparse.Namespace) -> list[tuple[float, float]]:
    return [(args.before, args.rate), (args.during, args.step_rate), (args.after, args.rate)]


def main() -> None:
    args = _parser().parse_args()
    timeline = asyncio.run(run(args))
    report = Report(args.out)
    report(benchmark="autoscaling", paced=True, load_s=args.load_time, phases=phases(args), **row(timeline))
    for one in timeline.requests:
        if one.failure:
            print(f"failed at={one.began:.1f} reason={one.failure}")
    if args.page:
        words = (
            f"Paced replicas on a local Ray Serve, {args.load_time:g} s to load; devices are slept, not computed. "
            f"{args.rate:g} requests a second of {NUM_PROMPT} and {NUM_OUTPUT} tokens, {args.step_rate:g} in between."
        )
        Path(args.page).write_text(page(timeline, phases(args), words), encoding="utf-8")
    raise SystemExit(any(one.failure for one in timeline.requests))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.autoscaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second before and after the step")
    parser.add_argument("--step-rate", type=float, default=15.0)
    for name, seconds in (("before", 10.0), ("during", 30.0), ("after", 40.0)):
        parser.add_argument(f"--{name}", type=float, default=seconds, help="seconds of that phase")
    parser.add_argument("--load-time", type=float, default=4.0, help="seconds that a replica takes to load")
    parser.add_argument("--max-replicas", type=int, default=4)
    parser.add_argument("--target-wait", type=float, default=1.0)
    parser.add_argument("--max-wait", type=float, help="refuse what would wait longer, with Retry-After")
    parser.add_argument("--look-back", type=float, default=5.0)
    parser.add_argument("--upscale-delay", type=float, default=1.0)
    parser.add_argument("--downscale-delay", type=float, default=10.0)
    parser.add_argument("--from-zero", action="store_true", help="let the model go to sleep first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", help="write the timeline there, as HTML")
    parser.add_argument("-o", "--out", help="append the line to this file too")
    return parser


if __name__ == "__main__":
    main()
