"""The language models that are measured, and the arithmetic of what a step of them must at least move and compute.

Random weights take as long as trained ones. Bytes: a decode reads every weight but the input embedding once, and the
keys and values of every position before it. Operations: two for each multiplication with a weight, and the two products
of attention over the positions a causal mask leaves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from serve.ranks.text_geometry import TextGeometry, read_text

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
"""Of meta-llama/Llama-3.1-8B."""
TINY: dict[str, Any] = {
    **LLAMA_8B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rope_scaling": None,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""To rehearse with."""


@dataclass(frozen=True)
class TextShape:
    """A dense decoder by its config."""

    config: dict[str, Any]
    on_cuda: bool = True

    @classmethod
    def of(cls, *, is_rehearsal: bool) -> TextShape:
        return cls(TINY, on_cuda=False) if is_rehearsal else cls(LLAMA_8B)

    @cached_property
    def geometry(self) -> TextGeometry:
        return read_text(self.config, on_cuda=self.on_cuda)

    @property
    def vocab_size(self) -> int:
        return self.geometry.vocab_size

    @property
    def _embedding(self) -> int:
        return self.geometry.vocab_size * self.geometry.hidden_size

    @property
    def step_weight_bytes(self) -> int:
        """Weights that a decode step reads, whatever its batch; rows of the input embedding are nothing beside them."""
        geometry = self.geometry
        unread = 0 if geometry.ties_embeddings else self._embedding
        return (geometry.num_parameters - unread) * geometry.bytes_per_weight

    def decode_bytes(self, positions: float) -> float:
        """Of a decode step whose sequences have so many positions together."""
        return self.step_weight_bytes + positions * self.geometry.kv_bytes_per_token()

    def decode_flop(self, batch: int, positions: float) -> float:
        return batch * 2 * (self._layer_matrices + self._embedding) + self._attention(positions)

    def prefill_flop(self, length: int) -> float:
        """Of one prompt, whose last position alone asks for logits."""
        pairs = length * (length + 1) / 2
        return 2 * (length * self._layer_matrices + self._embedding) + self._attention(pairs)

    @property
    def _layer_matrices(self) -> int:
        geometry = self.geometry
        norms = (2 * geometry.num_layers + 1) * geometry.hidden_size
        return geometry.num_parameters - (1 if geometry.ties_embeddings else 2) * self._embedding - norms

    def _attention(self, pairs: float) -> float:
        """Over so many pairs of a query and a key, in all layers: scores, and the sum of values."""
        geometry = self.geometry
        return 4.0 * pairs * geometry.num_heads * geometry.head_dim * geometry.num_layers

    def write(self, folder: Path) -> Path:
        """The config alone, to be loaded with random weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder
