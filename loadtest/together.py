"""Text and images on one server: `python -m loadtest.together http://127.0.0.1:8000 [--seconds 20] [-r REPS]`.

Chat streams alone, image streams alone, then both at once, each for so many seconds and in turn for every repetition;
so many streams of a kind are always open. Chat tells its inter-token latency (ITL, the gaps between content chunks),
images their step time, from the server's progress events: of k steps that are told at once each took a k-th. Both are
the client's view; the server should do nothing else meanwhile.

Then images are cancelled on the otherwise idle server by closing their connection after the second step, and the
server's metrics tell what that cost: the time from the cancellation's arrival in the engine to the end of the job there
(`tandem_cancel_to_free_seconds`), and denoise steps computed beyond the last that the client had seen.

Prints one `RESULT {json}` line per phase and one for the cancellations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loadtest.client import Server
from loadtest.measure.outcome import Outcome
from loadtest.report import Report, percentiles
from loadtest.targets.openai import OpenAIServer, Protocol
from loadtest.targets.target import Failed, Spool
from loadtest.traffic.ask import TextAsk
from loadtest.traffic.words import Words

IMAGES = "/v1/images/generations"
PROMPT_WORDS = 16
PUSH_S = 1.2
"""Every process tells the hub its metrics about once a second."""
SETTLE_S = 30.0
"""For a cancelled image to appear in them."""


async def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    server, report = Server.at(args.url, args.api_key), Report(args.out)
    chat: list[Stream] = [partial(chat_stream, server, args)] * args.chat_streams
    images: list[Stream] = [partial(image_stream, server, args)] * args.image_streams
    phases = {"chat alone": chat, "images alone": images, "together": chat + images}
    tallies = {name: Tally() for name in phases}
    await run(phases["together"], Tally(), args.warm_up)
    for _ in range(args.reps):
        for name, streams in phases.items():
            await run(streams, tallies[name], args.seconds)
    about = {"chat_streams": args.chat_streams, "image_streams": args.image_streams, "steps": args.steps or "default"}
    for name, tally in tallies.items():
        report(workload=name, reps=args.reps, seconds=args.seconds, **about, **tally.row(args.reps * args.seconds))
    if args.cancels:
        report(workload="cancel", **await cancel(server, args))


@dataclass(slots=True)
class Tally:
    """What the streams of a phase saw, those that were cut off at its end too."""

    chats: list[Outcome] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    images_s: list[float] = field(default_factory=list)
    """From the request to the finished image."""

    def row(self, seconds: float) -> dict[str, Any]:
        gaps = [gap for chat in self.chats for gap in chat.itls]
        row: dict[str, Any] = {}
        if gaps:
            row = {"chat_itl_ms": percentiles(gaps), "chat_chunks_s": (len(gaps) + len(self.chats)) / seconds}
        if self.steps_s:
            row |= {"image_step_ms": percentiles(self.steps_s), "image_steps_s": len(self.steps_s) / seconds}
            row |= {"image_e2e_ms": percentiles(self.images_s), "images_s": len(self.images_s) / seconds}
        return row


Stream = Callable[[Tally], Coroutine[Any, Any, None]]
"""Requests of one kind, each sent when the one before it has ended, for ever. Raises RuntimeError when one fails: what
is left would be no measurement."""


async def run(streams: list[Stream], tally: Tally, seconds: float) -> None:
    """Keep all streams open for so long, then leave them. Raises what the first to fail raised."""
    tasks = [asyncio.create_task(stream(tally)) for stream in streams]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def chat_stream(server: Server, args: argparse.Namespace, tally: Tally) -> None:
    """Chats of `PROMPT_WORDS` random words and exactly `--output-len` tokens."""
    protocol = Protocol(model=args.chat_model, ignore_eos=True, sampling={"temperature": 0.0})
    target, words, source = OpenAIServer(server, protocol, Spool()), Words.uncounted(), random.Random()
    while True:
        prompt = words.prompt(PROMPT_WORDS, source)
        ask = TextAsk(prompt=prompt, num_prompt=PROMPT_WORDS, num_output=args.output_len, seed=source.getrandbits(31))
        chat = Outcome(len(tally.chats), ask, time.perf_counter())
        tally.chats.append(chat)
        try:
            await target.send(target.prepare(ask), chat, 0.0)
        except Failed as error:
            raise RuntimeError(f"chat failed: {error}") from None


async def image_stream(server: Server, args: argparse.Namespace, tally: Tally) -> None:
    while True:
        began = last_at = time.perf_counter()
        last_step = 0
        async with aclosing(server.events(IMAGES, _image_body(args, args.steps))) as events:
            async for now, event in events:
                if "error" in event:
                    raise RuntimeError(f"an image failed: {event['error'].get('message')}")
                if event["type"].endswith(".progress"):
                    count = event["step"] - last_step
                    if last_step:  # the first step's wait is also for a place, and for the text encoders
                        tally.steps_s += [(now - last_at) / count] * count
                    last_at, last_step = now, event["step"]
                elif event["type"].endswith(".completed"):
                    tally.images_s.append(now - began)


async def cancel(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Begin a long image, leave after its second step, and read in the metrics what was computed: so many times."""
    steps_past_seen: list[int] = []
    first = before = await settled(server, args.image_model)
    for _ in range(args.cancels):
        num_seen = await _begin_and_leave(server, args)
        after = await settled(server, args.image_model, num_cancelled=before.cancelled + 1)
        steps_past_seen.append(after.steps - before.steps - num_seen)
        before = after
    num_freed = before.value("tandem_cancel_to_free_seconds_count") - first.value("tandem_cancel_to_free_seconds_count")
    free_s = before.value("tandem_cancel_to_free_seconds_sum") - first.value("tandem_cancel_to_free_seconds_sum")
    return {
        "cancels": args.cancels,
        "cancel_to_free_ms": 1e3 * free_s / max(1.0, num_freed),
        "steps_past_seen": steps_past_seen,
        "still_running": before.running,
    }


async def _begin_and_leave(server: Server, args: argparse.Namespace) -> int:
    """Close the connection after the second step; how many steps were seen by then."""
    async with aclosing(server.events(IMAGES, _image_body(args, args.cancel_steps))) as events:
        async for _, event in events:
            if "error" in event:
                raise RuntimeError(f"an image failed: {event['error'].get('message')}")
            if (step := event.get("step", 0)) >= 2:
                return int(step)
    raise RuntimeError(f"an image of {args.cancel_steps} steps ended before two were told")


class Metrics:
    """One scrape, and what it says of one model, all processes together."""

    def __init__(self, text: str, model: str):
        self._lines = [line for line in text.splitlines() if f'model="{model}"' in line]

    def value(self, name: str, *labels: str) -> float:
        """The sum of the series with this name and all of these `label="value"`."""
        found = [line for line in self._lines if line.startswith(name + "{") and all(part in line for part in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    @property
    def running(self) -> int:
        return int(self.value("tandem_requests_running") + self.value("tandem_requests_waiting"))

    @property
    def cancelled(self) -> int:
        return int(self.value("tandem_jobs_total", 'reason="cancelled"'))

    @property
    def steps(self) -> int:
        """Forwards of the transformer."""
        return int(self.value("tandem_image_step_seconds_count", 'stage="denoise"'))


async def settled(server: Server, model: str, num_cancelled: int = 0) -> Metrics:
    """The metrics once so many jobs were cancelled and no more is computed. Raises RuntimeError when that lasts."""
    until = time.monotonic() + SETTLE_S
    last: int | None = None
    while time.monotonic() < until:
        found = Metrics(await server.get("/metrics"), model)
        if not found.running and found.cancelled >= num_cancelled and found.steps == last:
            return found
        last = found.steps
        await asyncio.sleep(PUSH_S)
    raise RuntimeError(
        f"the metrics of {model} show {found.running} jobs and {found.cancelled} cancelled ones after {SETTLE_S:g} s; "
        f"leave the server to this test, and let --cancel-steps last longer than a round trip"
    )


def _image_body(args: argparse.Namespace, num_steps: int | None) -> bytes:
    fields: dict[str, Any] = {
        "model": args.image_model,
        "prompt": args.prompt,
        "stream": True,
        "stream_progress": True,
    }
    if num_steps:
        fields["num_inference_steps"] = num_steps
    return json.dumps(fields).encode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.together", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url", help="of a server with both models, http://127.0.0.1:8000 say")
    parser.add_argument("--chat-model", default="tandem-text")
    parser.add_argument("--image-model", default="tandem-image")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--chat-streams", type=int, default=4)
    parser.add_argument("--image-streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds of both before the first phase")
    parser.add_argument("-r", "--reps", type=int, default=3, help="of the three phases in turn")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of a chat answer")
    parser.add_argument("--prompt", default="a red circle on a white background", help="of the images")
    parser.add_argument("--steps", type=int, help="denoise steps of an image; default: the model's own")
    parser.add_argument("--cancels", type=int, default=5, help="images to cancel")
    parser.add_argument("--cancel-steps", type=int, default=100, help="denoise steps of those")
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    return parser


if __name__ == "__main__":
    asyncio.run(main())
