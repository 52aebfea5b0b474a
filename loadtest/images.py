"""Measures the image engine in-process: `python -m loadtest.images MODEL [--concurrency 1,4,16] [--steps N] [-r REPS]`.

MODEL is an embedded model, a folder, or `dit-s-2`: random weights in the shape of DiT-S/2, 256 x 256 pixels. The engine
is stepped by hand on so many images at a time (C1, C4, C16), and beside it the stock diffusers pipeline makes the same
ones, one by one and in static batches of that size: same weights, seeds, steps, guidance. Repetitions are interleaved,
figures are medians. Then the engine alone on eight requests at a time whose steps, guidance and solvers differ and
which arrive at random steps: just eight (M8), and thirty-two, newcomers taking the places of finished ones (M32).

Prints one `RESULT {json}` line each. A repetition with `foreign_cores` above about 0.05 is no measurement: something
else used the machine. `levels_from_*` is the largest difference of any pixel, in 255ths.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loadtest.dummy_dit import DIT_S_2, write_dit
from loadtest.image_peers import (
    NO_DIFFUSERS,
    Ask,
    EnginePeer,
    Picture,
    StepMeter,
    StockPeer,
    diffusers_version,
    largest_difference,
)
from loadtest.report import Report
from loadtest.workload import CpuMeter, peak_rss_mb
from serve.options import ModelOptions

Make = Callable[[list[Ask]], list[Picture]]

_THINGS = ("red circle", "blue square", "green triangle", "yellow circle")
_GROUNDS = ("white", "black", "gray")
MOST_MIXED = 8
"""Requests at a time of the mixed workload, of 6 to 20 steps."""


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    diffusers = diffusers_version()
    if diffusers is None:
        print(NO_DIFFUSERS)
        return 2
    report = Report(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        is_dummy = args.model == "dit-s-2"
        options = ModelOptions(
            model=str(write_dit(Path(scratch) / "dit-s-2", DIT_S_2)) if is_dummy else args.model,
            kind="image",
            load_format="dummy" if is_dummy else "auto",
            dtype=args.dtype,
            threads=args.threads,
            max_num_images=max(32, *args.concurrency),
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        bench = Bench(
            options, f"torch {torch.__version__} diffusers {diffusers}", args.steps, has_peers=not args.no_peer
        )
        for concurrency in args.concurrency:
            for row in bench.compare(concurrency, args.num_images, repetitions=args.reps):
                report(**row)
        for num_images in () if args.no_mix else (MOST_MIXED, 4 * MOST_MIXED):
            report(**bench.mix(num_images, repetitions=args.reps))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.images", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="embedded model, folder, or dit-s-2")
    parser.add_argument("-c", "--concurrency", type=_numbers, default=[1, 4, 16], help="images at a time: 1,4,16")
    parser.add_argument(
        "-n", "--num-images", type=int, default=4, help="of a repetition, at least; full batches of them"
    )
    parser.add_argument("--steps", type=int, help="denoise steps of an image; default: the model's own")
    parser.add_argument("-r", "--reps", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--max-num-batched-tokens", type=int, help="latent tokens times rows of a step")
    parser.add_argument("--no-peer", action="store_true", help="leave the stock pipeline out")
    parser.add_argument("--no-mix", action="store_true", help="leave the mixed workload out")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


class Bench:
    """The engine and the stock pipeline over one model, and what is asked of them."""

    def __init__(self, options: ModelOptions, version: str, num_steps: int | None, *, has_peers: bool):
        started = time.perf_counter()
        self._ours = EnginePeer(options)
        load_s = time.perf_counter() - started
        card, limits = self._ours.card, self._ours.limits
        self._limits = limits
        self._num_steps = num_steps or limits.num_inference_steps
        self._stock = StockPeer(options, card) if has_peers else None
        self._about = {
            "version": version,
            "model": card.name,
            "config": f"{card.dtype} {card.device} budget {options.max_num_batched_tokens or 'default'}",
            "threads": card.threads,
            "load_s": round(load_s, 2),
            "size": f"{limits.width}x{limits.height}",
        }

    def compare(self, concurrency: int, num_images: int, *, repetitions: int) -> list[dict[str, Any]]:
        """A row for the engine at that many images at a time, and one for each way of the stock pipeline."""
        count = concurrency * -(-num_images // concurrency)
        ours = Entrant(lambda asks: self._ours.make(asks, concurrency), self._ours.meter)
        others: dict[str, Entrant] = {}
        if (stock := self._stock) is not None:
            others["one_at_a_time"] = Entrant(lambda asks: stock.make(asks, 1), stock.meter)
            others["static_batch"] = Entrant(lambda asks: stock.make(asks, concurrency), stock.meter)
        entrants = {EnginePeer.name: ours, **{f"diffusers {name}": other for name, other in others.items()}}
        for entrant in entrants.values():
            entrant.make(self._asks(concurrency, "warm", num_steps=2))
        for repetition in range(repetitions):
            for entrant in entrants.values():
                entrant.measure(self._asks(count, repetition))
        about = {"workload": f"C{concurrency}", "steps": self._num_steps, "guidance": self._limits.guidance_scale}
        rows = [self._row(name, entrant, **about) for name, entrant in entrants.items()]
        for name, other in others.items():
            rows[0][f"of_{name}"] = round(ours.images_s / other.images_s, 3)
            rows[0][f"levels_from_{name}"] = largest_difference(ours.pictures, other.pictures)
        return rows

    def mix(self, num_images: int, *, repetitions: int) -> dict[str, Any]:
        """A row of requests that have little in common."""
        dice = random.Random("arrivals")
        ours = Entrant(lambda asks: self._ours.make(asks, MOST_MIXED, arrivals=dice), self._ours.meter)
        ours.make(self._mixed(MOST_MIXED, "warm"))
        for repetition in range(repetitions):
            ours.measure(self._mixed(num_images, repetition))
        about = {"workload": f"M{num_images}", "steps": "6..20", "guidance": "on and off"}
        return self._row(EnginePeer.name, ours, **about)

    def _row(self, peer: str, entrant: Entrant, **about: Any) -> dict[str, Any]:
        return {"peer": peer, **self._about, **about, **entrant.row(self._limits.width * self._limits.height)}

    def _asks(self, count: int, repetition: int | str, *, num_steps: int | None = None) -> list[Ask]:
        dice = random.Random(f"images-{repetition}")
        return [
            Ask(
                prompt=self._prompt(index, dice),
                num_steps=num_steps or self._num_steps,
                guidance_scale=self._limits.guidance_scale,
                solver=self._limits.solvers[0],
                seed=dice.getrandbits(32),
            )
            for index in range(count)
        ]

    def _mixed(self, count: int, repetition: int | str) -> list[Ask]:
        dice = random.Random(f"mixed-{repetition}")
        guided = max(2.0, self._limits.guidance_scale) if self._limits.has_guidance else 1.0
        return [
            Ask(
                prompt=self._prompt(index, dice),
                num_steps=dice.randint(6, 20),
                guidance_scale=dice.choice((1.0, guided)),
                solver=dice.choice(self._limits.solvers),
                seed=dice.getrandbits(32),
            )
            for index in range(count)
        ]

    def _prompt(self, index: int, dice: random.Random) -> str:
        """Another one each time, so that nobody finds it in a cache."""
        if self._ours.takes_classes:
            return str(dice.randrange(1000))
        thing, ground = _THINGS[index % len(_THINGS)], _GROUNDS[index % len(_GROUNDS)]
        return f"a {thing} on a {ground} background, number {dice.randrange(10**6)}"


class Entrant:
    """One way to make images, measured over repetitions."""

    def __init__(self, make: Make, meter: StepMeter):
        """`meter` counts what `make` does."""
        self.make = make
        self.pictures: list[Picture] = []
        """Of the first repetition."""
        self._meter = meter
        self._repetitions: list[dict[str, float]] = []
        self._num_images = self._num_steps = 0

    def measure(self, asks: list[Ask]) -> None:
        self._meter.reset()
        cpu, started = CpuMeter(), time.perf_counter()
        pictures = self.make(asks)
        wall_s = time.perf_counter() - started
        own_cores, foreign_cores = cpu.cores()
        self._repetitions.append(
            {
                "wall_s": wall_s,
                "images_s": len(asks) / wall_s,
                "steps_s": sum(ask.num_steps for ask in asks) / wall_s,
                "mean_rows": self._meter.mean_rows,
                "step_ms": 1e3 * statistics.fmean(self._meter.times_s) if self._meter.times_s else 0.0,
                "own_cores": own_cores,
                "foreign_cores": foreign_cores,
            }
        )
        self._num_images = len(asks)
        self.pictures = self.pictures or pictures

    @property
    def images_s(self) -> float:
        return self._median("images_s")

    def row(self, num_pixels: int) -> dict[str, Any]:
        """`num_pixels`: of an image."""
        return {
            "reps": len(self._repetitions),
            "images": self._num_images,
            "wall_s": round(self._median("wall_s"), 4),
            "wall_all_s": self._all("wall_s"),
            "images_s": round(self.images_s, 4),
            "megapixel_steps_s": round(self._median("steps_s") * num_pixels / 1e6, 4),
            "mean_rows": round(self._median("mean_rows"), 2),
            "step_ms": round(self._median("step_ms"), 3),
            "own_cores": self._all("own_cores"),
            "foreign_cores": self._all("foreign_cores"),
            "peak_rss_mb": peak_rss_mb(),
        }

    def _median(self, name: str) -> float:
        return statistics.median(self._all(name, digits=12))

    def _all(self, name: str, digits: int = 3) -> list[float]:
        return [round(repetition[name], digits) for repetition in self._repetitions]


if __name__ == "__main__":
    raise SystemExit(main())
