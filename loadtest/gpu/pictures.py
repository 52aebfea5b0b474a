"""Is the image engine right on a GPU? In float32 the pictures of the CPU, the same ones in mixed batches with random
joins as alone, and the same with steps that overlap. In bfloat16 the difference that batching makes is measured, not
promised.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from loadtest.dummy_dit import DiTShape, write_dit
from loadtest.gpu.bench import Bench
from loadtest.image_peers import Ask, EnginePeer, Picture, largest_difference
from serve.options import ModelOptions
from serve.request import ImageLimits

SMALL = DiTShape(num_layers=4, width=128, num_heads=2, side=16, vae_channels=(16, 32))
TINY = DiTShape(num_layers=2, width=32, num_heads=2, side=8, vae_channels=(8, 8))
LEVELS = 1
"""Of 255, in float32: each shape of a matrix product adds up in another order, which may tip a rounding."""


def write_checkpoint(folder: Path, shape: DiTShape) -> Path:
    """A small class-conditional model with weights, the same on every device."""
    from models.dit.checkpoint import load_pipeline, read_index

    index = read_index(write_dit(folder, shape))
    load_pipeline(index, device=torch.device("cpu"), dtype=torch.float32, load_format="dummy").save_pretrained(folder)
    return folder


def make_mixed(peer: EnginePeer) -> list[Picture]:
    """Eight requests that differ in all they can, joining at random steps, at most five at a time."""
    return peer.make(_mixed(peer.limits), 5, arrivals=random.Random(0))


def make_alone(peer: EnginePeer) -> list[Picture]:
    """The same one by one."""
    return peer.make(_mixed(peer.limits), 1)


def peer_on(folder: Path, device: str, *, dtype: str = "float32", depth: int | None = None) -> EnginePeer:
    return EnginePeer(
        ModelOptions(
            model=str(folder),
            kind="image",
            device=device,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            threads=1,  # enough for such models, and quick on a busy machine
        ),
        depth=depth,
    )


def check(bench: Bench, scratch: Path, *, shape: DiTShape = SMALL) -> list[str]:
    """Rows of how far pictures differ, in levels of 255; what differs where it must not."""
    device = bench.device.type
    folder = write_checkpoint(scratch / "small-dit", TINY if bench.is_rehearsal else shape)
    with exact_convolutions():
        expected = make_alone(peer_on(folder, "cpu"))
        alone = make_alone(peer_on(folder, device, depth=0))
        found = {
            "float32 pictures": largest_difference(alone, expected),
            "float32 pictures, alone and in mixed batches": largest_difference(
                make_mixed(peer_on(folder, device, depth=0)), alone
            ),
            "float32 pictures, overlapping steps": largest_difference(
                make_mixed(peer_on(folder, device, depth=1)), alone
            ),
        }
    for what, levels in found.items():
        bench.row("correct", what=what, model="dit", levels=levels)
    low = peer_on(folder, device, dtype="bfloat16")
    levels = largest_difference(make_mixed(low), make_alone(low))
    bench.row("stable", what="bfloat16 pictures, alone and in mixed batches", model="dit", levels=levels)
    return [what for what, levels in found.items() if levels > LEVELS]


def _mixed(limits: ImageLimits) -> list[Ask]:
    return [
        Ask(
            prompt=str(37 * number),
            num_steps=3 + number,
            guidance_scale=(1.0, 4.0)[number % 2],
            solver=limits.solvers[number % len(limits.solvers)],
            seed=number,
        )
        for number in range(8)
    ]


def exact_convolutions() -> AbstractContextManager[None]:
    """While it is entered, float32 convolutions are float32; else cuDNN rounds their inputs to TF32's 10 bits."""
    exact: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return exact
