"""The GPU script's part on images, on the CPU: what it compares is really different, and its figures are right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from loadtest import gpu_images
from loadtest.device_limits import DeviceLimits
from loadtest.dummy_dit import DiTShape
from loadtest.image_peers import largest_difference
from loadtest.report import Report

torch.set_num_threads(1)
TINY = DiTShape(num_layers=2, width=32, num_heads=2, side=8, vae_channels=(8, 8))


class Rows(Report):
    """Keeps what is reported."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rows: list[dict[str, Any]] = []

    def __call__(self, **row: Any) -> None:
        super().__call__(**row)
        self.rows.append(row)


def test_the_correctness_check_accepts_the_cpu_as_its_own_equal(tmp_path):
    report = Rows()
    assert gpu_images.check_images(tmp_path, report, shape=TINY, device="cpu")
    assert [row["kind"] for row in report.rows] == ["correctness"] * 3 + ["stability"]
    assert all(row["levels"] <= 1 for row in report.rows[:3])


def test_pictures_of_different_requests_differ_clearly(tmp_path):
    pictures = gpu_images.make_alone(gpu_images.peer_on(gpu_images.write_checkpoint(tmp_path / "m", TINY), "cpu"))
    assert all(largest_difference([a], [b]) > 10 for a, b in itertools.combinations(pictures, 2))


def test_a_wrong_device_is_found(tmp_path, monkeypatch):
    made = iter([[bytes(48)], [b"\2" * 48], [bytes(48)], [bytes(48)], [bytes(48)], [bytes(48)]])
    monkeypatch.setattr(gpu_images, "peer_on", lambda *_, **__: None)
    monkeypatch.setattr(gpu_images, "make_alone", lambda _: next(made))
    monkeypatch.setattr(gpu_images, "make_mixed", lambda _: next(made))
    assert not gpu_images.check_images(tmp_path, Rows(), shape=TINY, device="cpu")


def test_rates_are_shares_of_the_limits(tmp_path, monkeypatch):
    report = Rows()
    monkeypatch.setattr(gpu_images, "_time", lambda make, asks: 1.0 + 0.01 * asks[0].num_steps)
    limits = DeviceLimits("none", 1e12, 1e15)
    gpu_images.measure_images(tmp_path, limits, report, shape=TINY, rows=(1, 4), device="cpu")
    peers = ["tandem-image-engine"] * 4 + ["diffusers static batch"] * 2
    assert [row["peer"] for row in report.rows] == peers and [row["rows"] for row in report.rows] == [1, 4] * 3
    last = report.rows[-1]
    assert last["step_ms"] == pytest.approx(10) and last["images_s"] == pytest.approx(4 / 1.5)
    assert last["share_of_matmul_rate"] == pytest.approx(4 * TINY.row_flop / 0.01 / 1e15)


def test_every_row_is_an_image(tmp_path):
    report = Rows()
    limits = DeviceLimits("none", 1e12, 1e15)
    gpu_images.measure_images(tmp_path, limits, report, shape=TINY, rows=(3,), num_steps=(1, 2), device="cpu")
    assert [row["config"] for row in report.rows] == ["float32 depth 0", "float32 depth 1", "float32"]
    assert all(row["images_s"] > 0 and row["size"] == "16x16" for row in report.rows)
