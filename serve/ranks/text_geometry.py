"""What of a dense decoder's `config.json` decides how it can be split, and what each rank of a split holds.

Arithmetic over the families the native decoder computes; which share of what a rank has is decided in one place,
`models/parallel.py`. A test compares the bytes with those of loaded models, rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.parallel import even_share, head_share, layer_range, vocabulary_share
from models.quantized.scheme import ON_LOAD, Scheme

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
    scheme: Scheme | None = None
    """Of the layers' matrices, where they are quantised."""

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
            - len(layer_range(self.num_layers, stage, num_stages)) * self._saved_bytes(rank, tensor_size)
            for stage in range(num_stages)
            for rank in range(tensor_size)
        ]

    def kv_bytes_per_token(self, stage: int = 0, num_stages: int = 1, tensor_size: int = 1) -> int:
        """Keys and values of one position on each rank of a stage."""
        heads = len(head_share(self.num_kv_heads, 0, tensor_size))
        layers = len(layer_range(self.num_layers, stage, num_stages))
        return 2 * layers * heads * self.head_dim * self.bytes_per_weight

    def _layer_parameters(self, rank: int, size: int) -> int:
        (qkv, hidden), (_, query), (both, _), _ = matrices = self._matrices(rank, size)
        held = sum(rows * columns for rows, columns in matrices) + qkv * self.has_qkv_bias
        # A row-split matrix's bias is added once, after the sum.
        has_row_bias = rank == 0
        held += hidden * has_row_bias * (self.has_output_bias + self.has_mlp_bias) + both * self.has_mlp_bias
        # The norm of queries and keys lies in memory once for every head.
        num_normed = (query + (qkv - query) // 2) * self.has_qk_norm
        return held + 2 * hidden + num_normed

    def _matrices(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Output and input features: of queries, keys and values; of attention's output; of gate and up; of down."""
        hidden, inner = self.hidden_size, len(even_share(self.intermediate_size, rank, size))
        query = len(head_share(self.num_heads, rank, size)) * self.head_dim
        qkv = query + 2 * len(head_share(self.num_kv_heads, rank, size)) * self.head_dim
        return [(qkv, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner)]

    def _saved_bytes(self, rank: int, size: int) -> int:
        """In a layer, by its matrices being quantised."""
        if self.scheme is None:
            return 0
        return sum(
            rows * columns * self.bytes_per_weight
            - self.scheme.fitted(columns).num_bytes(rows, columns, self.bytes_per_weight)
            for rows, columns in self._matrices(rank, size)
        )


def read_text(
    config: dict[str, Any], *, dtype: str = "auto", on_cuda: bool = False, quantization: str | None = None
) -> TextGeometry:
    """The geometry in a `config.json`. `dtype`, `quantization`: of the options' values; auto is as stored, on CUDA of
    16 bits.

    Raises GeometryError for a family that is not among `_FAMILIES`, for quantised weights in forms that are not
    computed or that differ between the layers' matrices, and for missing numbers.
    """
    names = config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else config.get("model_type")
    family = _FAMILIES.get(str(architecture))
    if family is None:
        raise GeometryError(
            f"{architecture!r} is not among the architectures whose split is known ({', '.join(_FAMILIES)})"
        )
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
        scheme=_read_scheme(config, quantization, on_cuda=on_cuda),
    )


def _read_scheme(config: dict[str, Any], quantization: str | None, *, on_cuda: bool) -> Scheme | None:
    """Of the layers' matrices as they will be held. On CPU fp8 is held as floats."""
    if "quantization_config" not in config:
        return None if quantization is None else ON_LOAD[quantization]
    from models.quantize import Quantization  # torch, which takes seconds to import
    from models.text.base import ModelError

    try:
        scheme = Quantization.of(config, quantization).only_scheme(_count(config, "num_hidden_layers"))
    except ModelError as error:
        raise GeometryError(str(error)) from None
    return None if scheme is not None and scheme.values == "fp8" and not on_cuda else scheme


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
