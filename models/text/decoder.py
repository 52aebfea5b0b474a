"""The native decoder: one forward over the flat tokens of a step, for every `DenseArchitecture`.

Prefill chunks and decodes lie side by side in one [T, D] tensor; only attention knows which token belongs to which
sequence, through the context. Weights of one layer that read the same input are one matrix (q, k and v; gate and up).

Legend: T tokens of the step, D hidden size, N query heads, K key/value heads, H head dimension, R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from models.layers import Linear, rms_norm, swiglu
from models.text.architecture import DenseArchitecture
from models.text.base import StepContext
from models.text.rope import RopeTable, rotate


class Decoder:
    """A `CausalLM` with its weights. Uninitialised until `weights.py` has filled `parameters()`."""

    def __init__(
        self, architecture: DenseArchitecture, *, dtype: torch.dtype, device: torch.device, num_positions: int
    ):
        spec = architecture.spec
        self.spec = replace(spec, dtype=dtype)
        self.architecture = architecture
        self.device = device
        self._embedding_VD = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self._layers = [_Layer(index, architecture, dtype=dtype, device=device) for index in range(spec.num_layers)]
        self._norm_D = torch.empty(spec.hidden_size, dtype=dtype, device=device)
        self._head = Linear(
            spec.hidden_size, [("lm_head", spec.vocab_size)], has_bias=False, dtype=dtype, device=device
        )
        if architecture.ties_embeddings:
            self._head.weight_ED = self._embedding_VD
        self._rope = RopeTable(architecture.rope, num_positions=num_positions, dtype=dtype, device=device)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name → the storage it fills."""
        named = {"model.embed_tokens.weight": self._embedding_VD, "model.norm.weight": self._norm_D}
        for layer in self._layers:
            named.update(layer.parameters())
        if not self.architecture.ties_embeddings:
            named.update(self._head.parameters())
        return named

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters().values())

    @property
    def unused_names(self) -> tuple[str, ...]:
        """What a checkpoint may hold without a place here: tied embeddings stored twice."""
        return ("lm_head.weight",) if self.architecture.ties_embeddings else ()

    def finish(self) -> None:
        """Called once, when the weights are in."""

    @torch.inference_mode()
    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        x_TD = F.embedding(token_ids_T, self._embedding_VD)
        cos_T1H, sin_T1H = self._rope.at(positions_T)
        for layer in self._layers:
            layer.advance(x_TD, cos_T1H, sin_T1H, context)
        return rms_norm(x_TD, self._norm_D, self.architecture.norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self._head(hidden_RD).float()


class _Layer:
    """Attention and feed-forward, each normed before and added after."""

    def __init__(self, index: int, architecture: DenseArchitecture, *, dtype: torch.dtype, device: torch.device):
        spec, inner = architecture.spec, architecture.intermediate_size
        name = f"model.layers.{index}"
        heads_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

        def linear(in_features: int, parts: list[tuple[str, int]], *, has_bias: bool) -> Linear:
            named = [(f"{name}.{part}", size) for part, size in parts]
            return Linear(in_features, named, has_bias=has_bias, dtype=dtype, device=device)

        def vector(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._index, self._name = index, name
        self._num_heads, self._num_kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._scale = spec.head_dim**-0.5
        self._eps = architecture.norm_eps
        self._window = architecture.windows[index]
        self._attention_norm_D, self._mlp_norm_D = vector(spec.hidden_size), vector(spec.hidden_size)
        # One row per query and key head, so that both are normed in one call.
        self._qk_norm_NH = torch.empty(spec.num_heads + spec.num_kv_heads, spec.head_dim, dtype=dtype, device=device)
        self._has_qk_norm = architecture.has_qk_norm
        self._qkv = linear(
            spec.hidden_size,
            [("self_attn.q_proj", heads_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)],
            has_bias=architecture.has_qkv_bias,
        )
        self._output = linear(
            heads_width, [("self_attn.o_proj", spec.hidden_size)], has_bias=architecture.has_output_bias
        )
        self._gate_up = linear(
            spec.hidden_size, [("mlp.gate_proj", inner), ("mlp.up_proj", inner)], has_bias=architecture.has_mlp_bias
        )
        self._down = linear(inner, [("mlp.down_proj", spec.hidden_size)], has_bias=architecture.has_mlp_bias)

    def parameters(self) -> dict[str, torch.Tensor]:
        named = {
            f"{self._name}.input_layernorm.weight": self._attention_norm_D,
            f"{self._name}.post_attention_layernorm.weight": self._mlp_norm_D,
        }
        if self._has_qk_norm:
            named[f"{self._name}.self_attn.q_norm.weight"] = self._qk_norm_NH[: self._num_heads]
            named[f"{self._name}.self_attn.k_norm.weight"] = self._qk_norm_NH[self._num_heads :]
        for linear in (self._qkv, self._output, self._gate_up, self._down):
            named.update(linear.parameters())
        return named

    def advance(self, x_TD: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor, context: StepContext) -> None:
        """Add this layer's two contributions to `x_TD` in place."""
        x_TD += self._attend(rms_norm(x_TD, self._attention_norm_D, self._eps), cos_T1H, sin_T1H, context)
        x_TD += self._down(swiglu(self._gate_up(rms_norm(x_TD, self._mlp_norm_D, self._eps))))

    def _attend(
        self, x_TD: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor, context: StepContext
    ) -> torch.Tensor:
        num_heads, num_rotated = self._num_heads, self._num_heads + self._num_kv_heads
        qkv_TNH = self._qkv(x_TD).view(x_TD.shape[0], num_rotated + self._num_kv_heads, self._head_dim)
        qk_TNH = qkv_TNH[:, :num_rotated]
        if self._has_qk_norm:
            qk_TNH = rms_norm(qk_TNH, self._qk_norm_NH, self._eps)
        qk_TNH = rotate(qk_TNH, cos_T1H, sin_T1H)
        out_TNH = context.attention.attend(
            qk_TNH[:, :num_heads],
            qk_TNH[:, num_heads:],
            qkv_TNH[:, num_rotated:],
            context.kv_cache[self._index],
            context.plan,
            scale=self._scale,
            window=self._window,
        )
        return self._output(out_TNH.reshape(x_TD.shape[0], -1))
