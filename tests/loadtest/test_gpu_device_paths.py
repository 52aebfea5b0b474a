"""What the GPU measurements do on a device only, over stand-ins for the device: events, its profile, its warnings."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from pathlib import Path

import pytest
import torch

from loadtest.gpu import overlap, text, timing
from loadtest.gpu.bench import Bench, WrongResult
from loadtest.gpu.correct import write_checkpoint
from loadtest.gpu.driver import Driver
from loadtest.gpu.limits import DeviceLimits
from loadtest.gpu.machine import About, datasheet_flop_s
from loadtest.gpu.occupancy import Span
from loadtest.gpu.shapes import TINY, TextShape
from serve.options import ModelOptions

torch.set_num_threads(1)


@pytest.fixture
def bench(tmp_path) -> Bench:
    """As on a device, but that tensors are on the CPU."""
    about = dataclasses.replace(About.here("a test", is_rehearsal=True, commit="test"), device="NVIDIA H200")
    bench = Bench("text", tmp_path, about, budget_s=1000.0)
    bench.is_rehearsal = False
    return bench


@pytest.fixture
def driver(tmp_path) -> Driver:
    folder = write_checkpoint(tmp_path / "model", "llama")
    return Driver(ModelOptions(model=str(folder), device="cpu", threads=1, kv_cache_memory_bytes=16 << 20))


def profiled(step, num_steps: int) -> list[Span]:
    """Each step keeps the device busy for 900 of 1000 microseconds, and has one copy in."""
    spans = []
    for i in range(num_steps):
        step()
        spans.append(Span("Memcpy HtoD (Pinned -> Device)", i * 1e-3, i * 1e-3 + 1e-5))
        spans.append(Span("attend", i * 1e-3 + 1e-5, i * 1e-3 + 9e-4))
    return spans


def test_a_stopwatch_takes_the_median_of_the_devices_own_times(monkeypatch):
    ticks = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(ticks)

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stopwatch = timing.Stopwatch(torch.device("cpu"), seconds=0.02)
    stopwatch._device = torch.device("cuda")  # from here on events count
    calls: list[None] = []
    found = stopwatch(lambda: calls.append(None))
    assert found.median_s == found.low_s == found.high_s == 1e-3 and found.spread == 0.0
    assert len(calls) == 1 + 2 + 20


def test_idle_shares_and_longest_kernels_are_kept(bench, driver, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "watch", profiled)
    monkeypatch.setattr(text, "IDLE_BATCHES", (1, 2))
    monkeypatch.setattr(text, "CONTEXT", 16)
    monkeypatch.setattr(driver, "prompts", lambda number, length: [[5] * min(length, 100)] * number)
    shape = TextShape(TINY, on_cuda=False)
    text._Measured(bench, shape, DeviceLimits("NVIDIA H200", 1e9, 1e12), Path(tmp_path)).idle(driver)
    for row in bench.outcome.of_kind("idle"):
        assert row["busy_ms"] == pytest.approx(0.9) and row["kernels"] == 1.0
        assert row["idle_between"] == pytest.approx(0.1, rel=0.1) and row["step_ms"] is None
    steps = {row["step"]: row["name"] for row in reversed(bench.outcome.of_kind("profile"))}
    assert steps == {"decode of 1": "attend", "decode of 2": "attend", "prefill of 8192": "attend"}


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize("waits", [False, True])
def test_a_decode_step_that_waits_for_the_device_is_wrong(bench, driver, monkeypatch, waits):
    monkeypatch.setattr(overlap, "Driver", lambda options: driver)
    monkeypatch.setattr(overlap, "watch", profiled)
    monkeypatch.setattr(overlap, "BATCHES", (2,))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    step = driver.engine.step

    def waiting() -> bool:
        if waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return step()

    monkeypatch.setattr(driver.engine, "step", waiting)
    if waits:
        with pytest.raises(WrongResult, match="1 synchronising calls a step"):
            overlap.run(bench)
    else:
        overlap.run(bench)
    greedy, sampled = bench.outcome.of_kind("overlap")
    assert greedy["copies_in"] == 1.0 and sampled["synchronisations"] == float(waits)


def test_the_datasheet_knows_the_cards_by_name():
    assert datasheet_flop_s("NVIDIA H100 80GB HBM3") == datasheet_flop_s("NVIDIA H200") == 989.4e12
    assert datasheet_flop_s("another") is None
    assert DeviceLimits("another", 1.0, 2.0).peak_flop_s == 2.0
