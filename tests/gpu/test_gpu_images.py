"""On a CUDA device: the same images as on CPU, in mixed batches as alone, and steps that do not wait for the device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.gpu import pictures
from loadtest.image_peers import EnginePeer, Picture, largest_difference
from serve.image.forward_graph import budget_of

pytest.importorskip("diffusers", reason="no diffusers: image models are made of its parts, so none is checked")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: images on CUDA, their batches and their overlapping steps remain unchecked",
    ),
]


@pytest.fixture(scope="module", params=["class-conditional", "text to image"])
def folder(request, tmp_path_factory) -> Path:
    from tiny_pipelines import dit_pipeline, save, sd3_pipeline

    make = dit_pipeline if request.param == "class-conditional" else sd3_pipeline
    return save(make(), tmp_path_factory.mktemp("models") / "it")


@pytest.fixture(scope="module", autouse=True)
def exact():
    with pictures.exact_convolutions():
        yield


@pytest.fixture(scope="module")
def alone(folder) -> list[Picture]:
    return pictures.make_alone(pictures.peer_on(folder, "cuda", depth=0))


def test_float32_images_are_those_of_the_cpu(folder, alone):
    assert largest_difference(alone, pictures.make_alone(pictures.peer_on(folder, "cpu"))) <= pictures.LEVELS


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_images_in_mixed_batches_are_those_made_alone(folder, alone, depth):
    assert (
        largest_difference(pictures.make_mixed(pictures.peer_on(folder, "cuda", depth=depth)), alone) <= pictures.LEVELS
    )


def test_steps_overlap_by_default(folder):
    peer = pictures.peer_on(folder, "cuda")
    assert peer.card.dtype == "float32" and peer.card.device.startswith("cuda") and peer._engine._depth == 1


def test_denoise_and_decode_steps_do_not_wait_for_the_device(folder):
    peer = pictures.peer_on(folder, "cuda", depth=1)
    for _ in range(3):
        pictures.make_mixed(peer)  # kernels are compiled at a shape's first use, graphs are captured at its third
    waits = _waits(peer)
    pictures.make_mixed(peer)
    assert waits == []


def test_pictures_by_graphs_are_those_without_and_memory_of_graphs_is_counted(folder, alone):
    peer = pictures.peer_on(folder, "cuda")
    runner: Any = peer._engine._runner
    graphs = runner._forward.__self__
    for _ in range(3):
        assert largest_difference(pictures.make_mixed(peer), alone) <= pictures.LEVELS
    # So small a model takes the host longer to launch than the device to compute.
    assert graphs._graphs and 0 < graphs.num_bytes < budget_of(torch.device("cuda"))


def _waits(peer: EnginePeer) -> list[str]:
    """Filled with torch's warnings of synchronising calls while batches of these stages are submitted. Encoding may
    wait, once an image: tokens come from the host."""
    waits: list[str] = []
    runner: Any = peer._engine._runner
    submit = runner.submit

    def watched(batch: Any) -> Any:
        if batch.stage == "encode":
            return submit(batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return submit(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.extend(f"{batch.stage}: {warning.message}" for warning in caught)

    runner.submit = watched
    return waits
