"""Llama-3.1-8B's shape with random weights in our engine: decode, prefill, a mixed trace, and what speculation and the
prefix cache bring. Each beside the floor that the measured bandwidth and matrix rate set (`limits.py`, `shapes.py`).

No two prompts share anything unless that is what is measured. Drafts that hold are made by the requests themselves: a
logit bias that leaves one, two or eight tokens to draw from, so that a draft by lookup holds always, every second or
every eighth time; both sides of the comparison carry it.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path

import torch

from loadtest.gpu.bench import Bench
from loadtest.gpu.driver import Driver
from loadtest.gpu.limits import DeviceLimits, limits_of
from loadtest.gpu.occupancy import Span, busiest, occupancy, watch
from loadtest.gpu.shapes import TextShape
from loadtest.gpu.trace import LOADS, TINY_LOADS, mixed_trace, play, summary
from serve.options import ModelOptions, SpeculativeOptions

BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXT = 1024
PREFILLS = ((1, 1024), (8, 1024), (1, 8192))
"""Prompts that come together, and tokens of each."""
IDLE_BATCHES = (1, 64)
_PROFILED = 20
"""Steps."""
PREFIX = (64, 2048, 64)
"""Prompts, tokens they share, tokens of their own."""
SPECULATION = (1, 8, 64)
"""Sequences at a time."""
DRAWN_FROM = (1, 2, 8)
"""Tokens that a bias leaves: a draft holds in one of so many cases."""


def run(bench: Bench) -> None:
    shape = TextShape.of(is_rehearsal=bench.is_rehearsal)
    limits = limits_of(bench)
    with tempfile.TemporaryDirectory() as scratch:
        measured = _Measured(bench, shape, limits, shape.write(Path(scratch) / "model"))
        driver = measured.driver()
        bench.row(
            "model",
            parameters=driver.card.num_parameters,
            dtype=driver.card.dtype,
            kv_cache_tokens=driver.card.kv_cache_tokens,
            load_s=driver.card.load_s,
        )
        for measure in (measured.decode, measured.prefill, measured.idle, measured.mixed, measured.prefix):
            with bench.attempt(measure.__name__):
                measure(driver)
            driver.run()  # what a failed one has left
        driver.close()
        del driver
        free()
        if bench.has_time("speculation", 25 if not bench.is_rehearsal else 0):
            measured.speculation(measured.driver(SpeculativeOptions(method="ngram")))


class _Measured:
    """What the measurements share."""

    def __init__(self, bench: Bench, shape: TextShape, limits: DeviceLimits, folder: Path):
        self._bench = bench
        self._shape = shape
        self._limits = limits
        self._folder = folder
        self._is_tiny = bench.is_rehearsal

    def driver(self, speculation: SpeculativeOptions | None = None) -> Driver:
        return Driver(text_options(self._folder, self._bench, speculation))

    def decode(self, driver: Driver) -> None:
        batches, context, num_steps = ((1, 3), 40, 8) if self._is_tiny else (BATCHES, CONTEXT, 48)
        driver.decodes(driver.prompts(1, 16), 8)  # warm
        for batch in batches:
            if not self._bench.has_time(f"decode of {batch}", 0 if self._is_tiny else 2 + batch / 16):
                continue
            found = driver.decodes(driver.prompts(batch, context), num_steps)
            num_bytes, flop = self._shape.decode_bytes(found.positions), self._shape.decode_flop(batch, found.positions)
            floor_s = self._limits.floor_s(num_bytes, flop)
            self._bench.row(
                "decode",
                batch=batch,
                context=context,
                tok_s=found.tok_s,
                step_ms=1e3 * found.step_s,
                p90_ms=1e3 * found.p90_s,
                floor_ms=1e3 * floor_s,
                roofline=floor_s / found.step_s,
                steps=found.num_steps,
            )

    def prefill(self, driver: Driver) -> None:
        for number, length in ((1, 32), (3, 32)) if self._is_tiny else PREFILLS:
            if not self._bench.has_time(f"prefill of {number} x {length}", 0 if self._is_tiny else 4):
                continue
            times = [driver.prefill_s(driver.prompts(number, length)) for _ in range(4)][1:]
            took = statistics.median(times)
            flop = number * self._shape.prefill_flop(length)
            self._bench.row(
                "prefill",
                prompts=number,
                tokens=length,
                ttft_ms=1e3 * took,
                low_ms=1e3 * min(times),
                high_ms=1e3 * max(times),
                tok_s=number * length / took,
                mfu=flop / took / self._limits.peak_flop_s,
                matmul_share=flop / took / self._limits.matmul_flop_s,
            )

    def idle(self, driver: Driver) -> None:
        if self._is_tiny:
            self._bench.note("how long the device is idle: that takes CUDA's profiler")
            return
        for batch in IDLE_BATCHES:
            if not self._bench.has_time(f"idle share at {batch}", 5 + batch / 16):
                continue
            prompts = driver.prompts(batch, CONTEXT)
            streams = [driver.submit(prompt, 64 + batch // 4) for prompt in prompts]
            while any(stream.job.num_output < 8 for stream in streams) and driver.engine.step():
                pass
            spans = watch(driver.engine.step, _PROFILED)
            driver.run()
            found = occupancy(spans, _PROFILED)
            decodes = [row for row in self._bench.outcome.of_kind("decode") if row["batch"] == batch]
            self._bench.row(
                "idle",
                batch=batch,
                busy_ms=1e3 * found.busy_s,
                profiled_step_ms=1e3 * found.span_s,
                step_ms=decodes[0]["step_ms"] if decodes else None,
                idle_between=found.idle_between,
                not_busy=found.not_busy,
                kernels=found.kernels,
            )
            self._profile(f"decode of {batch}", spans, _PROFILED)
        if self._bench.has_time("profile of a prefill", 5):
            driver.submit(driver.prompts(1, 8192)[0], 1)
            spans = watch(driver.engine.step, 2)  # the step, and what settles it
            driver.run()
            self._profile("prefill of 8192", spans, 1)

    def _profile(self, step: str, spans: list[Span], num_steps: int) -> None:
        for name, calls, seconds, share in busiest(spans, num_steps):
            self._bench.row("profile", step=step, name=name[:100], calls=calls, microseconds=1e6 * seconds, share=share)

    def mixed(self, driver: Driver) -> None:
        for name, number, rate in TINY_LOADS if self._is_tiny else LOADS:
            if not self._bench.has_time(f"mixed trace, {name}", 0 if self._is_tiny else 15):
                continue
            asks = mixed_trace(self._shape.vocab_size, num_requests=number, rate=rate, is_tiny=self._is_tiny)
            self._bench.row("mixed", engine="tandem", load=name, **summary(asks, play(driver, asks)))

    def prefix(self, driver: Driver) -> None:
        number, shared, own = (3, 64, 8) if self._is_tiny else PREFIX
        if not self._bench.has_time("prefix cache", 0 if self._is_tiny else 12):
            return
        (prefix,) = driver.prompts(1, shared)
        driver.prefill_s([prefix])
        apart = driver.prefill_s(driver.prompts(number, shared + own))
        together = driver.prefill_s([prefix + tail for tail in driver.prompts(number, own)])
        self._bench.row(
            "prefix",
            prompts=number,
            shared=shared,
            own=own,
            without_ms=1e3 * apart,
            with_ms=1e3 * together,
            times_faster=apart / together,
        )

    def speculation(self, driver: Driver) -> None:
        batches, num_output = ((2,), 24) if self._is_tiny else (SPECULATION, 128)
        for drawn_from in DRAWN_FROM:
            bias = tuple((100 + i, 100.0) for i in range(drawn_from))
            for batch in batches:
                name = f"speculation of {batch}, drawn from {drawn_from}"
                if not self._bench.has_time(name, 0 if self._is_tiny else 6):
                    continue
                rates, held = {}, 0.0
                for may_speculate in (True, False, True, False):  # the first of each warms up
                    streams = [
                        driver.submit(
                            prompt,
                            num_output,
                            temperature=float(drawn_from > 1),
                            logit_bias=bias,
                            may_speculate=may_speculate,
                        )
                        for prompt in driver.prompts(batch, 32)
                    ]
                    ends = driver.run()
                    rates[may_speculate] = batch * (num_output - 1) / (ends[-1].at_s - ends[0].at_s)
                    if may_speculate:
                        jobs = [stream.job for stream in streams]
                        held = sum(job.num_accepted for job in jobs) / max(1, sum(job.num_drafted for job in jobs))
                self._bench.row(
                    "speculation",
                    batch=batch,
                    drawn_from=drawn_from,
                    held=held,
                    with_tok_s=rates[True],
                    without_tok_s=rates[False],
                    times_faster=rates[True] / rates[False],
                )


def text_options(folder: Path, bench: Bench, speculation: SpeculativeOptions | None = None) -> ModelOptions:
    """Defaults of the product, but for the weights; in a rehearsal small enough for a busy machine."""
    if bench.is_rehearsal:
        return ModelOptions(
            model=str(folder),
            load_format="dummy",
            device="cpu",
            threads=1,
            max_num_seqs=8,
            kv_cache_memory_bytes=4 << 20,
            speculative_config=speculation,
        )
    return ModelOptions(model=str(folder), load_format="dummy", device="cuda", speculative_config=speculation)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
