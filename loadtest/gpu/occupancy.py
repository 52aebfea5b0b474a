"""What the device did during some steps, from torch's profiler: how long it was busy, and how long it had nothing.

Two figures of idleness, as they mean different things. `idle_between`: in gaps of more than ten microseconds, which is
the device waiting for the host. `not_busy`: in all gaps, those between the kernels of one graph included, which the
host cannot close.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HOST_GAP_S = 10e-6
"""Kernels of a graph follow each other within a microsecond or two."""


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or a copy, in seconds of the profiler's clock."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one step, on average."""

    span_s: float
    busy_s: float
    idle_between: float
    """Share of the time in gaps of more than ten microseconds."""
    kernels: float
    copies_in: float
    copies_out: float

    @property
    def not_busy(self) -> float:
        return 1.0 - self.busy_s / self.span_s


def occupancy(spans: list[Span], num_steps: int) -> Occupancy:
    """Of the time from the first span's begin to the last one's end."""
    if not spans:
        raise ValueError("the profiler has seen nothing on the device")
    ranked = sorted(spans, key=lambda span: span.start_s)
    busy_s = idle_s = 0.0
    until = ranked[0].start_s
    for span in ranked:
        gap = span.start_s - until
        if gap > HOST_GAP_S:
            idle_s += gap
        busy_s += max(0.0, span.end_s - max(until, span.start_s))
        until = max(until, span.end_s)
    whole_s = until - ranked[0].start_s
    copies_in = sum("HtoD" in span.name for span in spans)
    copies_out = sum("DtoH" in span.name for span in spans)
    copies = sum(span.name.startswith(("Memcpy", "Memset")) for span in spans)
    return Occupancy(
        whole_s / num_steps,
        busy_s / num_steps,
        idle_s / whole_s,
        (len(spans) - copies) / num_steps,
        copies_in / num_steps,
        copies_out / num_steps,
    )


def busiest(spans: list[Span], num_steps: int, most: int = 8) -> list[tuple[str, float, float, float]]:
    """Names of what took longest: with calls and seconds of a step, and their share of all that ran."""
    seconds: dict[str, float] = {}
    for span in spans:
        seconds[span.name] = seconds.get(span.name, 0.0) + span.end_s - span.start_s
    calls, whole_s = Counter(span.name for span in spans), sum(seconds.values())
    ranked = sorted(seconds, key=seconds.__getitem__, reverse=True)[:most]
    return [(name, calls[name] / num_steps, seconds[name] / num_steps, seconds[name] / whole_s) for name in ranked]


def watch(step: Callable[[], Any], num_steps: int) -> list[Span]:
    """What the device does while `step` is called so often. CUDA only."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return [
        Span(event.name(), event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9)
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
