"""The flags of `tandem loadtest`, named as `vllm bench serve` names them where the meaning is the same."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from loadtest.measure.verdict import __doc__ as VERDICTS
from loadtest.traffic.shapes import TEXT_SHAPES

DATASETS = (*TEXT_SHAPES, "image", "azure", "mooncake", "image_trace")
EPILOG = "exit status:\n" + (VERDICTS or "").split("\n", 2)[2]


class UsageError(ValueError):
    """Flags that do not fit together. Exit status 2."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tandem loadtest", description="Put a server under load and say what it carries."
    )
    actions = made.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("run", "send one load and measure it (what is done when no action is named)"),
        ("sweep", "the same load at several rates"),
        ("search", "find the highest rate at which enough requests meet their SLO"),
    ):
        action = actions.add_parser(
            name, help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for add in (_target, _workload, _images, _arrivals, _slo, _output):
            add(action)
        if name == "sweep":
            action.add_argument("--rates", type=_numbers, required=True, help="requests a second, as in 1,2,4,8")
        if name == "search":
            _search(action)
    compare = actions.add_parser("compare", help="one page from several result files, side by side")
    compare.add_argument("files", nargs="+", metavar="FILE", help="JSON results")
    compare.add_argument("-o", "--output", default="compare.html", metavar="FILE")
    return made


def _target(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("what is put under load")
    group.add_argument(
        "--backend", choices=("openai-chat", "openai", "engine"), default="openai-chat",
        help="chat completions or completions over HTTP; engine: Tandem's engines in this process, without a server",
    )  # fmt: skip
    group.add_argument("--base-url", help="of the server; else --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--endpoint", help="path, where it is not the backend's usual one")
    group.add_argument("--model", default="", help="text model; default: the first that the server lists")
    group.add_argument("--image-model", default="", help="default: the first image model that the server lists")
    group.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: OPENAI_API_KEY")
    group.add_argument("--header", action="append", default=[], metavar="KEY=VALUE", help="sent with every request")
    group.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="fields of every request")
    group.add_argument(
        "--tokenizer", default="", help="folder or tokenizer.json to count with; default: the server's /tokenize"
    )
    group.add_argument(
        "--ready-check-timeout-sec", type=float, default=60, metavar="S", help="wait so long for the server"
    )
    group.add_argument(
        "--request-timeout", type=float, default=600, metavar="S", help="give a request up after so long"
    )
    group.add_argument(
        "--lost-after", type=float, default=5, metavar="S", help="end the run after so long of nothing but failures"
    )


def _workload(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("what is asked (lengths in tokens)")
    group.add_argument("--dataset-name", choices=DATASETS, default="random")
    group.add_argument("--dataset-path", help="file of a trace (azure, mooncake, image_trace); default: a small sample")
    group.add_argument("--num-prompts", type=int, help="requests in all; default 1000, or as many as --duration holds")
    group.add_argument("--duration", type=float, metavar="S", help="send for so long")
    group.add_argument("--num-warmups", type=int, default=4, help="requests before the clock starts, not measured")
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrival times")
    group.add_argument("--input-len", "--random-input-len", type=int, default=128, dest="input_len")
    group.add_argument("--output-len", "--random-output-len", type=int, default=64, dest="output_len")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, help="lengths within (1 - R, 1 + R) times those"
    )
    group.add_argument("--prefix-repetition-prefix-len", type=int, default=256, dest="prefix_len")
    group.add_argument("--prefix-repetition-num-prefixes", type=int, default=4, dest="num_prefixes")
    group.add_argument("--num-turns", type=int, default=4, help="multi_turn: of a conversation")
    group.add_argument(
        "--think-time", type=float, default=0.0, metavar="S", help="multi_turn: between answer and next turn"
    )
    group.add_argument("--long-input-len", type=int, default=2048, help="long: of the long prompts")
    group.add_argument("--long-ratio", type=float, default=0.05, help="long: their share")
    group.add_argument("--trace-speed", type=float, default=1.0, help="traces: so many times as fast as recorded")
    group.add_argument("--length-scale", type=float, default=1.0, help="traces: lengths times this")
    group.add_argument(
        "--request-cancellation-rate", type=float, default=0.0, metavar="PERCENT", help="requests left early"
    )
    group.add_argument("--request-cancellation-delay", type=float, default=0.5, metavar="S", help="how early")
    group.add_argument(
        "--probe-request-rate", type=float, default=0.0, help="one-token requests a second beside the load"
    )
    group.add_argument("--ignore-eos", action="store_true", help="answers of exactly --output-len, and checked to be")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float)):
        group.add_argument(f"--{name}", type=kind)


def _images(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("images (what is not given is left to the server)")
    group.add_argument("--image-ratio", type=float, default=0.0, help="share of requests that are images, beside text")
    group.add_argument(
        "--image-size", type=_size, nargs="+", default=[], metavar="WxH", help="one or several to draw from"
    )
    group.add_argument("--image-steps", type=int, nargs="+", default=[], metavar="N", help="denoise steps")
    group.add_argument("--guidance", type=float, nargs="+", default=[], metavar="G")
    group.add_argument("--num-images", type=int, default=1, help="of a request")
    group.add_argument("--image-previews", type=int, default=0, help="previews on the way; streams the answer")
    group.add_argument("--image-prompt", default="", help="default: small pictures of forms and colours")
    group.add_argument(
        "--image-repeat-ratio", type=float, default=0.1, help="share that repeats an earlier request, seed and all"
    )


def _arrivals(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("when (open loop; with --max-concurrency and no rate: closed loop)")
    group.add_argument("--request-rate", type=float, default=float("inf"), help="requests a second; inf: all at once")
    group.add_argument("--burstiness", type=float, default=1.0, help="1 Poisson, below 1 bursty, inf evenly spaced")
    group.add_argument("--max-concurrency", type=int, help="requests at once")
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    group.add_argument("--ramp-up-start-rps", type=float)
    group.add_argument("--ramp-up-end-rps", type=float)
    group.add_argument("--stages", help="rates in turn: 2x30,2-10x60 is 2/s for 30 s, then from 2 to 10/s within 60 s")


def _slo(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("what is good")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits of ttft, tpot, e2el, ttfp, image_e2el; all must be met",
    )
    group.add_argument(
        "--min-good", type=float, help="share of good requests to reach (exit status 5); search: default 0.99"
    )
    group.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el,ttfp,image_e2el", help="metrics to print")
    group.add_argument("--metric-percentiles", type=_numbers, default=(50, 90, 99), metavar="P,P")


def _output(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("what is left behind")
    group.add_argument(
        "--save-result", action=argparse.BooleanOptionalAction, default=True, help="JSON, rows (JSONL) and an HTML page"
    )
    group.add_argument("--save-detailed", action="store_true", help="lists of every request in the JSON too, as vLLM's")
    group.add_argument("--result-dir", default=".", metavar="DIR")
    group.add_argument("--result-filename", metavar="FILE", help="of the JSON; the others end in .jsonl and .html")
    group.add_argument("--label", default="", help="what this run is called; default: the backend")
    group.add_argument("--metadata", nargs="+", default=[], metavar="KEY=VALUE", help="kept in the result")
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="while it runs")


def _search(action: argparse.ArgumentParser) -> None:
    group = action.add_argument_group("search")
    group.add_argument("--search-start", type=float, default=1.0, metavar="RATE", help="the first rate tried")
    group.add_argument("--search-limit", type=float, default=10_000, metavar="RATE", help="no higher than this")
    group.add_argument(
        "--search-tolerance", type=float, default=0.05, help="end when the answer is known to this share"
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(width), int(height)


def pairs(texts: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE, each. Raises ValueError."""
    found = {}
    for text in texts:
        key, is_pair, value = text.partition("=")
        if not is_pair:
            raise ValueError(f"{flag} {text!r}: write KEY=VALUE")
        found[key.strip()] = value.strip()
    return found
