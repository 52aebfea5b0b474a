"""What of a dense decoder's `config.json` decides how it can be split, and what each rank of a split holds.

Arithmetic over the families the native decoder computes; which share of what a rank has is decided in one place,
`models/parallel.py`. A test compares the bytes with those of loaded models, rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.parallel import even_share, head_share, layer_range, vocabulary_share

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number, by the name of its data type."""


class GeometryError(ValueError):
    """The model's description is not one that can be reckoned with; the message names what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextGeometry:
    """The shape of a dense decoder."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    bytes_per_weight: int
    """Also of an activation and of a number in the KV cache."""
    ties_embeddings: bool = False
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False

    kind = "text"

    @property
    def num_parameters(self) -> int:
        """Of the whole model on one rank, a tied head once."""
        return self.rank_parameters(0, 0, 1, 1)

    def rank_parameters(self, stage: int, tensor_rank: int, num_stages: int, tensor_size: int) -> int:
        """Parameters that one rank of a split holds."""
        layers = len(layer_range(self.num_layers, stage, num_stages))
        held = layers * self._layer_parameters(tensor_rank, tensor_size)
        share = len(vocabulary_share(self.vocab_size, tensor_rank, tensor_size)) * self.hidden_size
        is_first, is_last = stage == 0, stage == num_stages - 1
        held += share * is_first + self.hidden_size * is_last
        if is_last and not (self.ties_embeddings and is_first):  # a tied head on a stage of its own is a second copy
            held += share
        return held

    def weight_bytes(self, num_stages: int = 1, tensor_size: int = 1) -> list[int]:
        """Per rank, in the order of ranks: stage * tensor_size + tensor rank."""
        return [
            self.rank_parameters(stage, rank, num_stages, tensor_size) * self.bytes_per_weight
            for stage in range(num_stages)
            for rank in range(tensor_size)
        ]

    def kv_bytes_per_token(self, stage: int = 0, num_stages: int = 1, tensor_size: int = 1) -> int:
        """Keys and values of one position on each rank of a stage."""
        heads = len(head_share(self.num_kv_heads, 0, tensor_size))
        layers = len(layer_range(self.num_layers, stage, num_stages))
        return 2 * layers * heads * self.head_dim * self.bytes_per_weight

    def _layer_parameters(self, rank: int, size: int) -> int:
        hidden, inner = self.hidden_size, len(even_share(self.intermediate_size, rank, size))
        query = len(head_share(self.num_heads, rank, size)) * self.head_dim
        qkv = query + 2 * len(head_share(self.num_kv_heads, rank, size)) * self.head_dim
        held = qkv * (hidden + self.has_qkv_bias) + query * hidden + 3 * hidden * inner
        # A row-split matrix's bias is added once, after the sum.
        has_row_bias = rank == 0
        held += hidden * has_row_bias * (self.has_output_bias + self.has_mlp_bias) + 2 * inner * self.has_mlp_bias
        # The norm of queries and keys lies in memory once for every head.
        num_normed = (query + (qkv - query) // 2) * self.has_qk_norm
        return held + 2 * hidden + num_normed


def read_text(config: dict[str, Any], *, dtype: str = "auto", on_cuda: bool = False) -> TextGeometry:
    """The geometry in a `config.json`. `dtype`: of the option's values; auto is as stored, on CUDA of 16 bits.

    Raises GeometryError for a family that is not among `_FAMILIES`, for quantised weights and for missing numbers.
    """
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else config.get("model_type")
    family = _FAMILIES.get(str(architecture))
    if family is None:
        raise GeometryError(
            f"{architecture!r} is not among the architectures whose split is known ({', '.join(_FAMILIES)})"
        )
    if "quantization_config" in config:
        raise GeometryError("quantization_config is set: the bytes of packed weights are not reckoned here")
    num_heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    head_dim = int(config.get("head_dim") or (128 if family == "qwen3" else hidden // num_heads))
    bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
    return TextGeometry(
        architecture=str(architecture),
        num_layers=_count(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=head_dim,
        intermediate_size=_count(config, "intermediate_size"),
        vocab_size=_count(config, "vocab_size"),
        max_positions=int(config.get("max_position_embeddings") or 2048),
        bytes_per_weight=number_bytes(config.get("dtype") or config.get("torch_dtype"), dtype=dtype, on_cuda=on_cuda),
        ties_embeddings=bool(config.get("tie_word_embeddings", False)),
        has_qk_norm=family == "qwen3",
        has_qkv_bias=bias or family == "qwen2",
        has_output_bias=bias,
        has_mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
    )


def number_bytes(stored: Any, *, dtype: str = "auto", on_cuda: bool = False) -> int:
    """Bytes of a weight as it will be held. `stored`: the file's own name of its data type, or None."""
    if dtype != "auto":
        return BYTES[dtype]
    name = str(stored or "float32").removeprefix("torch.")
    if name not in BYTES:
        raise GeometryError(f"dtype is {name!r}; stored weights may be {', '.join(BYTES)}")
    return 2 if on_cuda else BYTES[name]


_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise GeometryError(f"{key} is {value!r}; a positive whole number is needed")
    return value
