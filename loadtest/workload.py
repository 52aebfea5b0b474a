"""The fixed workloads that engines are compared on, and what one measurement reports. No torch.

Every prompt is a list of token ids, every request asks for an exact number of output tokens (greedy, no end tokens).
Each repetition has other ids of the same lengths, so that a prefix cache cannot help across repetitions.

    W1   one request, 128 prompt tokens, 128 output tokens
    W2   32 requests, prompts uniform in 64..256, outputs uniform in 32..128, submitted together
    W3   32 requests with one shared prefix of 512 tokens and 32 of their own, 32 output tokens
    S1   one request, 16 prompt tokens, 256 output tokens (host cost of a step, on a tiny model)
    S32  32 such requests
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NAMES = ("W1", "W2", "W3", "S1", "S32")
_VOCAB = 32_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of a workload."""

    token_ids: list[int]
    num_output: int


Generate = Callable[[list[Prompt]], list[list[int]]]
"""Submits all prompts together and returns their outputs in order."""


def make_workload(name: str, repetition: int | str) -> list[Prompt]:
    """The requests of workload `name`. Lengths do not depend on the repetition, ids do."""
    shape, content = random.Random(f"shape-{name}"), random.Random(f"content-{name}-{repetition}")

    def ids(count: int) -> list[int]:
        return [content.randrange(300, _VOCAB - 10) for _ in range(count)]

    if name == "W1":
        return [Prompt(ids(128), 128)]
    if name == "W2":
        lengths = [(shape.randint(64, 256), shape.randint(32, 128)) for _ in range(32)]
        return [Prompt(ids(num_prompt), num_output) for num_prompt, num_output in lengths]
    if name == "W3":
        prefix = ids(512)
        return [Prompt(prefix + ids(32), 32) for _ in range(32)]
    if name in ("S1", "S32"):
        return [Prompt(ids(16), 256) for _ in range(int(name[1:]))]
    raise ValueError(f"workload {name!r} does not exist; choose from {', '.join(NAMES)}")


@dataclass(slots=True)
class CpuMeter:
    """CPU seconds used by this process, and by everything else on the machine (steal included)."""

    _busy_s: float = field(default_factory=lambda: _machine_s())
    _own_s: float = field(default_factory=time.process_time)
    _started: float = field(default_factory=time.perf_counter)

    def cores(self) -> tuple[float, float]:
        """(own, foreign) cores busy on average since construction. Disturbed when foreign is above about 0.05."""
        wall_s = time.perf_counter() - self._started
        own_s = time.process_time() - self._own_s
        foreign_s = max(0.0, _machine_s() - self._busy_s - own_s)
        return round(own_s / wall_s, 2), round(foreign_s / wall_s, 2)


def measure(name: str, generate: Generate, *, repetitions: int, about: dict[str, Any]) -> dict[str, Any]:
    """Run workload `name` and return one row of results, `about` (who was measured) included."""
    walls: list[float] = []
    ttfts: list[float] = []
    own: list[float] = []
    foreign: list[float] = []
    first: list[list[int]] = []
    for repetition in range(repetitions):
        prompts = make_workload(name, repetition)
        if len(prompts) == 1:
            started = time.perf_counter()
            generate([Prompt(make_workload(name, f"ttft-{repetition}")[0].token_ids, 1)])
            ttfts.append(time.perf_counter() - started)
        meter, started = CpuMeter(), time.perf_counter()
        outputs = generate(prompts)
        walls.append(time.perf_counter() - started)
        own_cores, foreign_cores = meter.cores()
        own.append(own_cores)
        foreign.append(foreign_cores)
        assert [len(output) for output in outputs] == [prompt.num_output for prompt in prompts]
        first = first or outputs
    num_in = sum(len(prompt.token_ids) for prompt in prompts)
    num_out = sum(prompt.num_output for prompt in prompts)
    wall_s = statistics.median(walls)
    ttft_s = statistics.median(ttfts) if ttfts else None
    return {
        **about,
        "workload": name,
        "reps": repetitions,
        "requests": len(prompts),
        "prompt_tokens": num_in,
        "output_tokens": num_out,
        "wall_s": round(wall_s, 4),
        "wall_all_s": [round(wall, 3) for wall in walls],
        "out_tok_s": round(num_out / wall_s, 1),
        "total_tok_s": round((num_in + num_out) / wall_s, 1),
        "ttft_s": None if ttft_s is None else round(ttft_s, 4),
        "decode_tok_s": None if ttft_s is None else round((num_out - 1) / (wall_s - ttft_s), 1),
        "step_ms": round(1e3 * wall_s / max(p.num_output for p in prompts), 3) if name[0] == "S" else None,
        "own_cores": own,
        "foreign_cores": foreign,
        "peak_rss_mb": peak_rss_mb(),
        "out_crc": zlib.crc32(json.dumps(first).encode()),
        "head": first[0][:8],
    }


def _machine_s() -> float:
    """Busy CPU seconds of the whole machine, steal included; 0 where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = (int(value) for value in file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peak_rss_mb() -> int | None:
    """The most memory this process has held; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmHWM"))
    except OSError:
        return None
