"""What splits move between devices, at the shapes of models people serve: the tables of `loadtest/results/ranks.md`.

    python -m loadtest.rank_costs        prints them; a test compares the page with them

Arithmetic of `serve/ranks/cost.py`, the same that `tandem plan` prints for one model; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serve.ranks.cost import (
    LINKS,
    Traffic,
    image_tensor_traffic,
    input_traffic,
    pipeline_traffic,
    row_traffic,
    tensor_traffic,
    ulysses_traffic,
)
from serve.ranks.image_geometry import read_image
from serve.ranks.text_geometry import TextGeometry, read_text

_LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}
TEXT_MODELS = {
    "Llama-3.1-8B": _LLAMA_3_1
    | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14336},
    "Llama-3.1-70B": _LLAMA_3_1
    | {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672},
}
FLUX_1 = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
    "guidance_embeds": True,
}
"""Of the dev variant."""
SIZES = (2, 4, 8)
BATCHES = (1, 32, 256)
SIDE = 1024
"""Pixels."""


def tables() -> str:
    """Both tables in Markdown."""
    links = [link.name for link in LINKS.values()]
    text = ["model", "split", "weights a rank", "KV a token and rank", "collectives", "sent a token"]
    text += [f"{link}, {batch}" for link in links for batch in BATCHES]
    image = ["split", "weights a rank", "collectives", "sent a step", *links]
    return "\n".join([*_markdown(text, _text_rows()), "", *_markdown(image, _image_rows())])


def _text_rows() -> Iterator[list[str]]:
    for name, config in TEXT_MODELS.items():
        model = read_text(config)
        yield [name, "one device", *_held(model, 1, 1), *["0"] * 2, *["0.00"] * (2 * len(BATCHES))]
        for size in SIZES:
            yield [name, f"TP {size}", *_held(model, 1, size), *_moved(model, size, 1)]
        for num_stages in SIZES:
            yield [name, f"PP {num_stages}", *_held(model, num_stages, 1), *_moved(model, 1, num_stages)]


def _held(model: TextGeometry, num_stages: int, size: int) -> list[str]:
    weights = max(model.weight_bytes(num_stages, size)) / 1e9
    return [f"{weights:.2f} GB", f"{model.kv_bytes_per_token(0, num_stages, size) / 1e3:.1f} kB"]


def _moved(model: TextGeometry, size: int, num_stages: int) -> list[str]:
    def step(num_seqs: int) -> Traffic:
        """One token for each: a pipeline has as many batches under way as stages."""
        tokens = -(-num_seqs // num_stages)
        traffic = tensor_traffic(model, size, num_tokens=tokens, num_rows=tokens)
        return traffic + pipeline_traffic(model, num_stages, num_tokens=tokens)

    one = step(1)
    times = [f"{step(batch).seconds(link) * 1e3:.2f}" for link in LINKS.values() for batch in BATCHES]
    return [str(one.num_collectives), f"{one.bytes_sent / 1e3:.1f} kB", *times]


def _image_rows() -> Iterator[list[str]]:
    model = read_image(FLUX_1, on_cuda=True)
    tokens = model.image_tokens(SIDE, SIDE)

    def row(split: str, size: int, traffic: Traffic) -> list[str]:
        times = [f"{traffic.seconds(link) * 1e3:.1f}" for link in LINKS.values()]
        sent = f"{traffic.bytes_sent / 1e6:.1f} MB"
        return [split, f"{model.weight_bytes(size) / 1e9:.1f} GB", str(traffic.num_collectives), sent, *times]

    for size in SIZES:
        yield row(f"TP {size}", size, image_tensor_traffic(model, size, image_tokens=tokens))
    for degree in SIZES:
        yield row(f"Ulysses {degree}", 1, ulysses_traffic(model, degree, image_tokens=tokens))
    yield row("rows 2", 1, row_traffic(model, 2, image_tokens=tokens))
    yield row("inputs, any split", 1, input_traffic(model, 2, image_tokens=tokens, num_rows=1))


def _markdown(heads: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    print(tables())
