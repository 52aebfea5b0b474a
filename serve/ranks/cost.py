"""What a split moves between devices and how long that takes: arithmetic with stated bandwidths, nothing measured here.

Bytes are those that one rank after another sends in one direction. N ranks add up a tensor of B bytes in
2 (N - 1) / N B (ring, or reduce-scatter and all-gather alike), gather their parts of it in (N - 1) / N B, and exchange
tokens for heads in (N - 1) / N of what each has. A collective takes a fixed time, whatever its size, and its bytes'.

Legend: L layers, D width, V vocabulary, N tensor_parallel_size, M pipeline_parallel_size, P ulysses_degree
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.ranks.image_geometry import ImageGeometry
from serve.ranks.text_geometry import TextGeometry


@dataclass(frozen=True, slots=True)
class Link:
    """How devices of one machine reach each other."""

    name: str
    bytes_per_s: float
    """One direction, of one device, as NCCL gets it."""
    latency_s: float
    """Of a collective of few bytes."""
    source: str


LINKS = {
    "nvlink": Link(
        "NVLink 4",
        370e9,
        10e-6,
        "450 GB/s a direction, of which NCCL gets about 370 (its maintainer, NVIDIA/nccl-tests issue 212); 6 us on two "
        "H100 with graphs, more on more of them (NVIDIA/nccl issue 1259): 10 assumed",
    ),
    "pcie": Link(
        "PCIe 5 x16",
        28e9,
        40e-6,
        "64 GB/s a direction; 28 GB/s among eight and 35 among four devices (NVIDIA/nccl issue 1639, RTX 5090); 42 us "
        "among eight devices (NVIDIA/nccl issue 1530, RTX 4090): 40 assumed",
    ),
}
MEMORY_BYTES_PER_S = 0.8 * 3.35e12
FLOPS = 0.5 * 989e12
DEVICE_SOURCE = "an H100 SXM: 3.35 TB/s and 989 TFLOP/s in bfloat16 by its data sheet, of which 0.8 and 0.5 are assumed"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one step."""

    num_collectives: int
    bytes_sent: float
    """One after another on the way of the step: of ranks that send at the same time, the busiest one's."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_collectives + other.num_collectives, self.bytes_sent + other.bytes_sent)

    def seconds(self, link: Link) -> float:
        return self.num_collectives * link.latency_s + self.bytes_sent / link.bytes_per_s


NOTHING = Traffic(0, 0.0)


def tensor_traffic(model: TextGeometry, size: int, *, num_tokens: int, num_rows: int = 0) -> Traffic:
    """Tensor parallel: after the embedding, attention and feed-forward of every layer the shards' [tokens, D] are added
    up: (2 L + 1) x 2 (N - 1) / N x D numbers a token. `num_rows` logits are gathered: (N - 1) / N x V numbers each."""
    if size == 1:
        return NOTHING
    num_sums = 2 * model.num_layers + 1
    logits = num_rows * model.vocab_size * model.bytes_per_weight
    return Traffic(
        num_sums + bool(num_rows),
        _sum_bytes(num_sums * num_tokens * model.hidden_size * model.bytes_per_weight, size)
        + logits * (size - 1) / size,
    )


def pipeline_traffic(model: TextGeometry, num_stages: int, *, num_tokens: int) -> Traffic:
    """Pipeline: M - 1 times [tokens, D] one after the other, sent by one rank each, N of them side by side."""
    sent = num_tokens * model.hidden_size * model.bytes_per_weight
    return Traffic(num_stages - 1, sent * (num_stages - 1))


def image_tensor_traffic(model: ImageGeometry, size: int, *, image_tokens: int, degree: int = 1) -> Traffic:
    """Tensor parallel, of one row: after attention and feed-forward of every block [tokens, D] of each stream.

    `degree`: ranks that share the tokens beside.
    """
    if size == 1:
        return NOTHING
    tokens = model.image_sums * image_tokens + model.text_sums * model.text_tokens
    return Traffic(model.num_sums, _sum_bytes(tokens / degree * model.hidden_size * model.bytes_per_weight, size))


def ulysses_traffic(model: ImageGeometry, degree: int, *, image_tokens: int, size: int = 1) -> Traffic:
    """Ulysses, of one row: in every attention queries, keys and values of a rank's tokens go out at once and the result
    comes back: 4 (P - 1) / P x D numbers for each of its tokens. At the end the tokens' output is gathered.

    `size`: shards beside, each of which has only its heads to exchange.
    """
    if degree == 1:
        return NOTHING
    tokens = (image_tokens + model.text_tokens) / degree
    each = tokens * model.hidden_size / size * model.bytes_per_weight * (degree - 1) / degree
    output = latent_bytes(model, image_tokens) / degree
    return Traffic(2 * model.num_attentions + 1, 4 * model.num_attentions * each + output)


def row_traffic(model: ImageGeometry, num_parts: int, *, image_tokens: int) -> Traffic:
    """Rows over ranks: every row's output goes to the driver, once a step."""
    return Traffic(1, latent_bytes(model, image_tokens)) if num_parts > 1 else NOTHING


def input_traffic(model: ImageGeometry, num_ranks: int, *, image_tokens: int, num_rows: int) -> Traffic:
    """What the driver sends every rank before a forward: the latents of all rows. Their text it sends once a prompt."""
    return NOTHING if num_ranks == 1 else Traffic(1, num_rows * latent_bytes(model, image_tokens))


def latent_bytes(model: ImageGeometry, image_tokens: int) -> int:
    """Of one row; latents travel in float32."""
    return 4 * image_tokens * model.token_latents


def image_flops(model: ImageGeometry, image_tokens: int) -> float:
    """Of one row's forward: 12 D^2 weights a token and block (attention and a feed-forward of 4 D), and attention."""
    tokens, width = image_tokens + model.text_tokens, model.hidden_size
    return model.num_attentions * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)


def _sum_bytes(num_bytes: float, size: int) -> float:
    return num_bytes * 2 * (size - 1) / size
