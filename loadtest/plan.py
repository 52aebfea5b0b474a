"""From flags to a load: which requests, when. The same flags and seed give the same load."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from loadtest.measure.driver import Load
from loadtest.traffic import arrivals, shapes
from loadtest.traffic.arrivals import Stage
from loadtest.traffic.ask import Ask
from loadtest.traffic.traces import Arrival, read_trace
from loadtest.traffic.words import Words

TRACES = {"azure": "azure", "mooncake": "mooncake", "image_trace": "image"}
DEFAULT_PROMPTS = 1000
RUN_SEEDS = 7919
"""Between the seeds of the runs of one command: far enough from the seeds that people choose."""


class Plan:
    """What the flags ask for. Raises ValueError on flags that do not fit together."""

    def __init__(self, args: argparse.Namespace, words: Words):
        self._args = args
        self._words = words
        self._trace: list[Arrival] = []
        if args.dataset_name in TRACES:
            path = Path(args.dataset_path) if args.dataset_path else None
            self._trace = read_trace(TRACES[args.dataset_name], path)
        elif args.dataset_path:
            raise ValueError(f"--dataset-path is for {', '.join(TRACES)}; --dataset-name is {args.dataset_name}")

    def load(self, *, rate: float | None = None, number: int = 0, is_confirmation: bool = False) -> Load:
        """`rate`: instead of the flags' own arrivals, a process of so many requests a second. `number`: of the run;
        each asks other things, else a prefix cache would know them. A confirmation has other arrivals too."""
        args = self._args
        offsets = None if self._is_closed and rate is None else self._offsets(rate, args.seed + is_confirmation)
        seed = args.seed + RUN_SEEDS * number
        return Load(
            asks=self.asks(seed),
            offsets=offsets,
            num_requests=args.num_prompts or (None if args.duration else DEFAULT_PROMPTS),
            duration_s=args.duration,
            max_concurrency=args.max_concurrency,
            probes=shapes.probes(seed),
            probe_rate=args.probe_request_rate,
            request_timeout_s=args.request_timeout,
            lost_after_s=args.lost_after,
        )

    def asks(self, seed: int) -> Iterator[Ask]:
        args = self._args
        mix = shapes.Mix(
            image_ratio=1.0 if args.dataset_name == "image" else args.image_ratio,
            cancel_ratio=args.request_cancellation_rate / 100,
            cancel_after_s=args.request_cancellation_delay,
        )
        image = shapes.images(self._image_shape(), seed)
        if self._trace:
            asks = shapes.replayed(self._trace, self._words, seed, args.length_scale)
            return shapes.mixed(asks, image, mix, seed)
        return shapes.mixed(shapes.texts(self._text_shape(), self._words, seed), image, mix, seed)

    def warm_ups(self) -> Iterator[Ask]:
        """Requests of each kind, with prompts that the load does not have."""
        return self.asks(self._args.seed - 1)

    @property
    def has_images(self) -> bool:
        return self._args.image_ratio > 0 or self._args.dataset_name in ("image", "image_trace")

    @property
    def has_texts(self) -> bool:
        args = self._args
        return args.probe_request_rate > 0 or (
            args.dataset_name not in ("image", "image_trace") and args.image_ratio < 1
        )

    @property
    def _is_closed(self) -> bool:
        args = self._args
        is_timed = args.stages or args.ramp_up_strategy or self._trace or not math.isinf(args.request_rate)
        return bool(args.max_concurrency) and not is_timed

    def _offsets(self, rate: float | None, seed: int) -> list[float]:
        args = self._args
        limits = {"num": args.num_prompts, "duration_s": args.duration}
        if rate is None and args.stages:
            found = arrivals.staged(arrivals.parse_stages(args.stages), burstiness=args.burstiness, seed=seed)
        elif rate is None and args.ramp_up_strategy:
            found = arrivals.staged([self._ramp()], burstiness=args.burstiness, seed=seed)
        elif rate is None and self._trace and math.isinf(args.request_rate):
            found = arrivals.replayed([arrival.at_s for arrival in self._trace], args.trace_speed)
            limits["num"] = args.num_prompts or (None if args.duration else len(self._trace))
        else:
            found = arrivals.constant_rate(rate or args.request_rate, burstiness=args.burstiness, seed=seed)
            is_endless = math.isinf(rate or args.request_rate) or not args.duration
            limits["num"] = args.num_prompts or (DEFAULT_PROMPTS if is_endless else None)
        return arrivals.first(found, **limits)

    def _ramp(self) -> Stage:
        """As long as --duration says, or as --num-prompts requests take."""
        args = self._args
        low, high = args.ramp_up_start_rps, args.ramp_up_end_rps
        if not low or not high or min(low, high) <= 0:
            raise ValueError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps above 0")
        is_exponential = args.ramp_up_strategy == "exponential"
        if args.duration:
            return Stage(low, args.duration, high, is_exponential)
        mean = (high - low) / math.log(high / low) if is_exponential and low != high else (low + high) / 2
        return Stage(low, (args.num_prompts or DEFAULT_PROMPTS) / mean, high, is_exponential)

    def _text_shape(self) -> shapes.TextShape:
        args = self._args
        return shapes.TextShape(
            name=args.dataset_name if args.dataset_name in shapes.TEXT_SHAPES else "random",
            input_len=args.input_len,
            output_len=args.output_len,
            range_ratio=args.random_range_ratio,
            prefix_len=args.prefix_len,
            num_prefixes=args.num_prefixes,
            num_turns=args.num_turns,
            think_s=args.think_time,
            long_input_len=args.long_input_len,
            long_ratio=args.long_ratio,
        )

    def _image_shape(self) -> shapes.ImageShape:
        args = self._args
        return shapes.ImageShape(
            sizes=tuple(args.image_size),
            steps=tuple(args.image_steps),
            guidances=tuple(args.guidance),
            prompt=args.image_prompt,
            num_images=args.num_images,
            num_previews=args.image_previews,
            repeat_ratio=args.image_repeat_ratio,
        )
