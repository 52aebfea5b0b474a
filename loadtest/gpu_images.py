"""The image engine on a GPU: is it right, and how many images a second for how many rows of a step?

Right means: in float32 the pictures of the CPU, the same ones in mixed batches with random joins as alone, and the same
with steps that overlap; each to one level of 255, as every shape of a matrix product adds up in another order. In
bfloat16 the difference that batching makes is measured, not promised.

Speed is that of a DiT-XL/2 with random weights and the VAE of Stable Diffusion, 256 x 256 pixels, each row an image of
its own without guidance (a guided one is two rows).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from loadtest.device_limits import DeviceLimits
from loadtest.dummy_dit import DIT_XL_2, DiTShape, write_dit
from loadtest.image_peers import Ask, EnginePeer, Picture, StockPeer, largest_difference
from loadtest.report import Report
from serve.options import ModelOptions
from serve.request import ImageLimits

ROWS = (1, 2, 4, 8, 16, 32)
NUM_STEPS = (10, 50)
"""Of a short and of a long run: their difference is denoising alone, the long one is what images/s are of."""
SMALL = DiTShape(num_layers=4, width=128, num_heads=2, side=16, vae_channels=(16, 32))


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


def check_images(scratch: Path, report: Report, *, shape: DiTShape = SMALL, device: str = "cuda") -> bool:
    """Correctness rows; False when pictures differ where they must not."""
    folder = write_checkpoint(scratch / "small-dit", shape)
    with exact_convolutions():
        expected = make_alone(peer_on(folder, "cpu"))
        alone = make_alone(peer_on(folder, device, depth=0))
        found = {
            "float32 pictures of the CPU": largest_difference(alone, expected),
            "float32 pictures alone and in mixed batches": largest_difference(
                make_mixed(peer_on(folder, device, depth=0)), alone
            ),
            "float32 pictures with overlapping steps": largest_difference(
                make_mixed(peer_on(folder, device, depth=1)), alone
            ),
        }
    for what, levels in found.items():
        report(kind="correctness", what=what, model="dit", levels=levels)
    low = peer_on(folder, device, dtype="bfloat16")
    levels = largest_difference(make_mixed(low), make_alone(low))
    report(kind="stability", what="bfloat16 pictures changed by batching", model="dit", levels=levels)
    return max(found.values()) <= 1


def measure_images(
    scratch: Path,
    limits: DeviceLimits,
    report: Report,
    *,
    shape: DiTShape = DIT_XL_2,
    rows: tuple[int, ...] = ROWS,
    num_steps: tuple[int, int] = NUM_STEPS,
    device: str = "cuda",
    has_peer: bool = True,
) -> None:
    """Speed rows: the engine waiting for each step and with steps that overlap, then the stock pipeline."""
    options = ModelOptions(
        model=str(write_dit(scratch / "dit-xl-2", shape)),
        kind="image",
        load_format="dummy",
        device=device,  # type: ignore[arg-type]
        max_num_images=max(rows),
        max_num_batched_tokens=max(rows) * shape.num_tokens,
    )
    speed = _Speed(shape, limits, rows, num_steps)
    for depth in (0, 1):
        ours = EnginePeer(options, depth=depth)
        card = ours.card
        config = f"{card.dtype} depth {depth}"
        speed.measure(EnginePeer.name, ours.make, ours.limits, report, config)
        image_limits = ours.limits
        del ours
        _free()
    if has_peer:
        stock = StockPeer(options, card)
        speed.measure("diffusers static batch", stock.make, image_limits, report, card.dtype)


class _Speed:
    """What is measured, the same for us and for a peer."""

    def __init__(self, shape: DiTShape, limits: DeviceLimits, rows: tuple[int, ...], num_steps: tuple[int, int]):
        self._shape = shape
        self._limits = limits
        self._rows = rows
        self._short, self._long = num_steps

    def measure(
        self,
        peer: str,
        make: Callable[[list[Ask], int], list[Picture]],
        limits: ImageLimits,
        report: Report,
        config: str,
    ) -> None:
        for rows in self._rows:
            short_s, long_s = (
                min(_time(make, [_plain(limits, n, num_steps) for n in range(rows)]) for _ in range(3))
                for num_steps in (self._short, self._long)
            )
            step_s = (long_s - short_s) / (self._long - self._short)
            report(
                kind="images",
                peer=peer,
                config=config,
                size=f"{limits.width}x{limits.height}",
                steps=self._long,
                rows=rows,
                step_ms=1e3 * step_s,
                images_s=rows / long_s,
                row_steps_s=rows / step_s,
                share_of_matmul_rate=rows * self._shape.row_flop / step_s / self._limits.matmul_flop_s,
            )


def _time(make: Callable[[list[Ask], int], list[Picture]], asks: list[Ask]) -> float:
    """Until the pictures are in host memory."""
    started = time.perf_counter()
    make(asks, len(asks))
    return time.perf_counter() - started


def _plain(limits: ImageLimits, number: int, num_steps: int) -> Ask:
    solver = limits.solvers[0]
    return Ask(prompt=str(number), num_steps=num_steps, guidance_scale=1.0, solver=solver, seed=number)


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


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
