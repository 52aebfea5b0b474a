"""The GPU measurements' comparison of pictures: what it compares is really different, and a wrong device is found."""

from __future__ import annotations

import itertools

import pytest
import torch

from loadtest.gpu import pictures
from loadtest.gpu.bench import Bench
from loadtest.gpu.machine import About
from loadtest.image_peers import largest_difference

pytest.importorskip("diffusers")
torch.set_num_threads(1)


@pytest.fixture
def bench(tmp_path):
    return Bench("correct", tmp_path, About.here("a test", is_rehearsal=True, commit="test"), budget_s=100.0)


def test_pictures_of_different_requests_differ_clearly(tmp_path):
    folder = pictures.write_checkpoint(tmp_path / "m", pictures.TINY)
    made = pictures.make_alone(pictures.peer_on(folder, "cpu"))
    assert all(largest_difference([a], [b]) > 10 for a, b in itertools.combinations(made, 2))


def test_a_wrong_device_is_found(bench, tmp_path, monkeypatch):
    made = iter([[bytes(48)], [b"\2" * 48], [bytes(48)], [bytes(48)], [bytes(48)], [bytes(48)]])
    monkeypatch.setattr(pictures, "peer_on", lambda *_, **__: None)
    monkeypatch.setattr(pictures, "make_alone", lambda _: next(made))
    monkeypatch.setattr(pictures, "make_mixed", lambda _: next(made))
    assert pictures.check(bench, tmp_path) == [
        "float32 pictures", "float32 pictures, alone and in mixed batches", "float32 pictures, overlapping steps"
    ]  # fmt: skip
