"""The image benchmark on a model of a few thousand weights: equal work for all, counted right."""

from __future__ import annotations

import itertools
import json
import random
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loadtest import image_peers, images
from loadtest.dummy_dit import DIT_S_2, DiTShape, write_dit
from loadtest.image_peers import Ask, EnginePeer, StockPeer, largest_difference
from serve.options import ModelOptions

TINY = DiTShape(num_layers=2, width=32, num_heads=2, side=8, vae_channels=(8, 8))


def options(folder: Path, **values: Any) -> ModelOptions:
    return ModelOptions(model=str(write_dit(folder, TINY)), kind="image", load_format="dummy", threads=1, **values)


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> EnginePeer:
    return EnginePeer(options(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """What the command reports, by peer and workload."""
    file = tmp_path_factory.mktemp("out") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "DIT_S_2", TINY)
        arguments = ["--concurrency", "1,3", "--steps", "4", "-r", "2", "-t", "1", "-o", str(file)]
        assert images.main(["dit-s-2", *arguments]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["peer"], row["workload"]): row for row in found}


def test_every_peer_has_a_row_of_the_same_work(rows):
    peers = {"tandem-image-engine", "diffusers one_at_a_time", "diffusers static_batch"}
    assert {key for key in rows if key[1][0] == "C"} == {(peer, load) for peer in peers for load in ("C1", "C3")}
    for (_, workload), row in rows.items():
        if workload[0] == "C":
            assert (row["images"], row["steps"], row["guidance"]) == ({"C1": 4, "C3": 6}[workload], 4, 4.0)
            assert row["size"] == "16x16" and row["model"] == "dit-s-2" and row["threads"] == 1
        assert len(row["wall_all_s"]) == len(row["foreign_cores"]) == row["reps"] == 2


def test_rows_of_a_forward_are_two_a_guided_image_and_those_at_a_time(rows):
    expected = {"C1": (2, 2, 2), "C3": (6, 2, 6)}
    for workload, (ours, single, batch) in expected.items():
        assert rows["tandem-image-engine", workload]["mean_rows"] == ours
        assert rows["diffusers one_at_a_time", workload]["mean_rows"] == single
        assert rows["diffusers static_batch", workload]["mean_rows"] == batch


def test_everybody_made_the_same_pictures(rows):
    for workload in ("C1", "C3"):
        row = rows["tandem-image-engine", workload]
        assert row["levels_from_one_at_a_time"] <= 1 and row["levels_from_static_batch"] <= 1
        assert row["of_one_at_a_time"] > 0 and row["of_static_batch"] > 0


def test_eight_different_requests_at_a_time_share_forwards(rows):
    assert rows["tandem-image-engine", "M32"]["mean_rows"] >= 6
    assert rows["tandem-image-engine", "M8"]["images"] == 8


def test_when_a_request_arrives_changes_no_picture(peer):
    asks = [
        Ask(prompt=str(n), num_steps=3 + n, guidance_scale=1.0 + n % 2, solver=peer.limits.solvers[n % 3], seed=n)
        for n in range(6)
    ]
    together = peer.make(asks, 4, arrivals=random.Random(1))
    alone = peer.make(asks, 1)
    assert largest_difference(together, alone) <= 1
    assert all(largest_difference([a], [b]) > 2 for a, b in itertools.pairwise(alone))


def test_prompts_of_a_text_model_are_texts(tmp_path):
    from tiny_pipelines import save, sd3_pipeline

    model = ModelOptions(model=str(save(sd3_pipeline(has_t5=False), tmp_path / "sd3")), kind="image", threads=1)
    ours = EnginePeer(model)
    asks = [Ask(prompt=p, num_steps=3, guidance_scale=4.0, solver=ours.limits.solvers[0], seed=5) for p in ("a", "b")]
    stock = StockPeer(model, ours.card)
    assert not ours.takes_classes
    assert largest_difference(ours.make(asks, 2), stock.make(asks, 2)) <= 1
    assert stock.meter.num_forwards == 3 and stock.meter.mean_rows == 4 and len(stock.meter.times_s) == 2


def test_without_diffusers_it_says_so(monkeypatch, capsys):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(image_peers, "version", missing)
    assert images.main(["dit-s-2"]) == 2
    assert "diffusers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [TINY, DIT_S_2])
def test_the_operations_of_a_row_are_those_torch_counts(shape, tmp_path):
    from diffusers import DiTTransformer2DModel

    config = json.loads((write_dit(tmp_path, shape) / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = DiTTransformer2DModel.from_config(config)
        latent, time, label = torch.zeros(1, 4, shape.side, shape.side), torch.zeros(1), torch.zeros(1).long()
        with FlopCounterMode(display=False) as counter:
            model(latent, timestep=time, class_labels=label)
    # Counted beside it: patches in and out and the embeddings of time and class, which weigh little in a large model.
    assert counter.get_total_flops() == pytest.approx(shape.row_flop, rel=0.25 if shape is TINY else 0.01)
