"""Every split of a model over some devices, with what it holds, moves and should take. Arithmetic, not measurement.

A decode step reads all weights and the keys and values of all sequences, and computes; the longer of the two counts.
What is moved between devices is added: nothing here hides it behind computing. A replica is one group of ranks, so
devices that a split leaves over make further replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from serve.ranks.cost import (
    FLOPS,
    MEMORY_BYTES_PER_S,
    Link,
    Traffic,
    image_flops,
    image_tensor_traffic,
    input_traffic,
    pipeline_traffic,
    row_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from serve.ranks.image_geometry import ImageGeometry
from serve.ranks.split import tensor_sizes, ulysses_degrees
from serve.ranks.text_geometry import TextGeometry

USUAL_TOKENS = 2048
"""Positions that a running sequence is taken to have, where it may have more: a guess, stated with the plan."""
STEP_TOKENS = 8192
"""Positions of the largest step, whose activations need room: the default of max_num_batched_tokens on CUDA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What there is to run on, and what for."""

    num_devices: int
    device_bytes: float
    """Of each, times the share of it that may be used."""
    link: Link
    max_model_len: int | None = None
    max_num_seqs: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One split on a fleet. Steps are decode steps, or denoise steps of one image of the model's usual size."""

    sizes: tuple[int, ...]
    """In the order of `SIZES` of the kind."""
    num_replicas: int
    weight_bytes: int
    """Of the fullest rank."""
    room_bytes: float
    """What the fullest rank has left, for the KV cache where there is one; below zero it does not fit."""
    kv_tokens: int
    """Of one replica; 0 for an image model."""
    num_running: int
    """Sequences or images that a replica computes at a time."""
    moved_once: float
    """Bytes sent, one rank after another, for one token, or for one image's step."""
    traffic: Traffic
    """Of one step with all that is running."""
    link_s: float
    step_s: float
    single_s: float
    """A step with one sequence or image."""

    @property
    def num_ranks(self) -> int:
        product = 1
        for size in self.sizes:
            product *= size
        return product

    @property
    def fits(self) -> bool:
        return self.room_bytes >= 0 and self.num_running > 0

    @property
    def per_s(self) -> float:
        """Tokens a second, or images' steps, of the whole fleet."""
        return self.num_replicas * self.num_running / self.step_s if self.fits else 0.0


def text_estimates(model: TextGeometry, fleet: Fleet) -> list[Estimate]:
    """All splits into at most as many ranks as there are devices, the fewest first."""
    grid = [
        (size, num_stages)
        for size in tensor_sizes(model)
        for num_stages in range(1, model.num_layers + 1)
        if size * num_stages <= fleet.num_devices
    ]
    return [
        _text(model, fleet, size, num_stages)
        for size, num_stages in sorted(grid, key=lambda pair: (pair[0] * pair[1], pair[1]))
    ]


def image_estimates(model: ImageGeometry, fleet: Fleet, *, driver_bytes: int) -> list[Estimate]:
    """The same for an image model. `driver_bytes`: text encoders and VAE, which only the driver has."""
    return [_image(model, fleet, sizes, driver_bytes) for sizes in sorted(_image_grid(model, fleet), key=_product)]


def _text(model: TextGeometry, fleet: Fleet, size: int, num_stages: int) -> Estimate:
    weights = model.weight_bytes(num_stages, size)
    num_weights = max(model.rank_parameters(*divmod(rank, size), num_stages, size) for rank in range(len(weights)))
    longest = min(fleet.max_model_len or model.max_positions, model.max_positions)
    usual = min(longest, USUAL_TOKENS)
    room = [fleet.device_bytes - held - _activation_bytes(model, fleet, size) for held in weights]
    kv_each = [model.kv_bytes_per_token(rank // size, num_stages, size) for rank in range(len(weights))]
    kv_tokens = max(0, int(min(left // each for left, each in zip(room, kv_each, strict=True))))
    holds_one = kv_tokens >= (fleet.max_model_len or usual)
    num_running = min(fleet.max_num_seqs, kv_tokens // usual) if holds_one else 0

    def step(num_seqs: int) -> tuple[Traffic, float]:
        """Of `num_seqs` sequences in as many batches as there are stages, until each has a token."""
        batch = -(-num_seqs // num_stages)
        read = max(held + each * batch * usual for held, each in zip(weights, kv_each, strict=True))
        computed = 2 * num_weights * batch
        traffic = tensor_traffic(model, size, num_tokens=batch, num_rows=batch)
        traffic += pipeline_traffic(model, num_stages, num_tokens=batch)
        return traffic, num_stages * max(read / MEMORY_BYTES_PER_S, computed / FLOPS) + traffic.seconds(fleet.link)

    traffic, step_s = step(max(num_running, 1))
    one, single_s = step(1)
    return Estimate(
        sizes=(size, num_stages),
        num_replicas=fleet.num_devices // (size * num_stages),
        weight_bytes=max(weights),
        room_bytes=min(room),
        kv_tokens=kv_tokens,
        num_running=num_running,
        moved_once=one.bytes_sent,
        traffic=traffic,
        link_s=traffic.seconds(fleet.link),
        step_s=step_s,
        single_s=single_s,
    )


def _activation_bytes(model: TextGeometry, fleet: Fleet, size: int) -> int:
    """Of the largest step: two wide middles and four widths of every position, and what the sampler holds of logits."""
    per_token = 2 * model.intermediate_size // size + 4 * model.hidden_size
    tokens = min(STEP_TOKENS, max(model.max_positions, fleet.max_num_seqs))
    return tokens * per_token * model.bytes_per_weight + 16 * fleet.max_num_seqs * model.vocab_size


def _image_grid(model: ImageGeometry, fleet: Fleet) -> Iterator[tuple[int, int, int]]:
    """(tensor, rows, tokens): rows up to those of one image, for more of them are better off as replicas."""
    for size in tensor_sizes(model):
        for rows in range(1, model.num_guided_rows + 1):
            for degree in ulysses_degrees(model, size):
                if size * rows * degree <= fleet.num_devices:
                    yield size, rows, degree


def _image(model: ImageGeometry, fleet: Fleet, sizes: tuple[int, int, int], driver_bytes: int) -> Estimate:
    size, rows, degree = sizes
    tokens, num_rows = model.image_tokens(model.default_side, model.default_side), model.num_guided_rows
    here = -(-num_rows // rows)
    traffic = row_traffic(model, rows, image_tokens=tokens)
    traffic += input_traffic(model, _product(sizes), image_tokens=tokens, num_rows=num_rows)
    for part in (
        image_tensor_traffic(model, size, image_tokens=tokens, degree=degree),
        ulysses_traffic(model, degree, image_tokens=tokens, size=size),
    ):
        traffic += Traffic(part.num_collectives, here * part.bytes_sent)
    weights = model.weight_bytes(size)
    computed = here * image_flops(model, tokens) / (size * degree)
    link_s = traffic.seconds(fleet.link)
    step_s = max(computed / FLOPS, weights / MEMORY_BYTES_PER_S) + link_s
    activations = here * (tokens + model.text_tokens) // degree * 16 * model.hidden_size * model.bytes_per_weight
    return Estimate(
        sizes=sizes,
        num_replicas=fleet.num_devices // _product(sizes),
        weight_bytes=weights,
        room_bytes=fleet.device_bytes - weights - driver_bytes - activations,
        kv_tokens=0,
        num_running=1,
        moved_once=traffic.bytes_sent,
        traffic=traffic,
        link_s=link_s,
        step_s=step_s,
        single_s=step_s,
    )


def _product(sizes: tuple[int, int, int]) -> int:
    return sizes[0] * sizes[1] * sizes[2]
