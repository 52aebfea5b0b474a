"""The native decoder: one forward over the flat tokens of a step, for every `DenseArchitecture`.

Prefill chunks and decodes lie side by side in one [T, D] tensor; only attention knows which token belongs to which
sequence, through the context. Weights of one layer that read the same input are one matrix (q, k and v; gate and up).

Legend: T tokens of the step, D hidden size, N query heads, K key/value heads, H head dimension, R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from models.layers import MIN_ROWS, GatedLinear, Linear, RMSNorm
from models.text.architecture import DenseArchitecture
from models.text.base import StepContext
from models.text.rope import RopeTable, interleave, rotate_


class Decoder:
    """A `CausalLM` with its weights. Uninitialised until `weights.py` has filled `parameters()`."""

    is_capturable = True
    """`forward` touches the device only, with the same operations for the same shapes: fit for CUDA graphs."""

    def __init__(
        self, architecture: DenseArchitecture, *, dtype: torch.dtype, device: torch.device, num_positions: int
    ):
        spec = architecture.spec
        self.spec = replace(spec, dtype=dtype)
        self.architecture = architecture
        self.device = device
        self._embedding_VD = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self._layers = [_Layer(index, architecture, dtype=dtype, device=device) for index in range(spec.num_layers)]
        self._norm = RMSNorm((spec.hidden_size,), architecture.norm_eps, dtype=dtype, device=device)
        self._head = Linear(
            spec.hidden_size, [("lm_head", spec.vocab_size)], has_bias=False, dtype=dtype, device=device
        )
        if architecture.ties_embeddings:
            self._head.weight_ED = self._embedding_VD
        self._min_rows = MIN_ROWS if device.type == "cpu" else 1
        self._rope = RopeTable(architecture.rope, num_positions=num_positions, device=device)
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters().values())

    def parameters(self) -> dict[str, torch.Tensor]:
        """Checkpoint name → the storage it fills."""
        named = {"model.embed_tokens.weight": self._embedding_VD, "model.norm.weight": self._norm.weight}
        for layer in self._layers:
            named.update(layer.parameters())
        if not self.architecture.ties_embeddings:
            named.update(self._head.parameters())
        return named

    @property
    def unused_names(self) -> tuple[str, ...]:
        """What a checkpoint may hold without a place here: tied embeddings stored twice."""
        return ("lm_head.weight",) if self.architecture.ties_embeddings else ()

    def finish(self) -> None:
        """Called once, when the weights are in: each matrix takes the layout it is computed in.

        A tied head that is packed becomes a matrix of its own beside the embedding, which is read row by row.
        """
        for layer in self._layers:
            layer.finish()
        self._norm.finish()
        self._head.finish()

    @torch.inference_mode()
    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, context: StepContext) -> torch.Tensor:
        num_tokens = token_ids_T.shape[0]
        if num_tokens < self._min_rows:
            missing = self._min_rows - num_tokens
            token_ids_T, positions_T = F.pad(token_ids_T, (0, missing)), F.pad(positions_T, (0, missing))
        x_TD = F.embedding(token_ids_T, self._embedding_VD)
        step = _Step(context, self._rope.at(positions_T), num_tokens)
        for layer in self._layers:
            x_TD = layer.advance(x_TD, step)
        return self._norm(x_TD)[:num_tokens]

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        num_rows = hidden_RD.shape[0]
        if num_rows < self._min_rows:
            hidden_RD = F.pad(hidden_RD, (0, 0, 0, self._min_rows - num_rows))
        return self._head(hidden_RD)[:num_rows].float()


@dataclass(frozen=True, slots=True)
class _Step:
    """What the layers of one forward share. Rows from `num_tokens` on are padding, of no sequence."""

    context: StepContext
    cis_T1C: torch.Tensor
    num_tokens: int


class _Layer:
    """Attention and feed-forward, each normed before and added after."""

    def __init__(self, index: int, architecture: DenseArchitecture, *, dtype: torch.dtype, device: torch.device):
        spec, inner = architecture.spec, architecture.intermediate_size
        name = f"model.layers.{index}"
        heads_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

        def linear(in_features: int, parts: list[tuple[str, int]], *, has_bias: bool) -> Linear:
            named = [(f"{name}.{part}", size) for part, size in parts]
            return Linear(in_features, named, has_bias=has_bias, dtype=dtype, device=device)

        def norm(*shape: int) -> RMSNorm:
            return RMSNorm(shape, architecture.norm_eps, dtype=dtype, device=device)

        self._index, self._name = index, name
        self._num_heads, self._num_kv_heads, self._head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self._scale = spec.head_dim**-0.5
        self._window = architecture.windows[index]
        self._attention_norm, self._mlp_norm = norm(spec.hidden_size), norm(spec.hidden_size)
        # One row per query and key head, so that both are normed in one call.
        num_rotated = spec.num_heads + spec.num_kv_heads
        self._qk_norm = norm(num_rotated, spec.head_dim) if architecture.has_qk_norm else None
        self._qkv = linear(
            spec.hidden_size,
            [("self_attn.q_proj", heads_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)],
            has_bias=architecture.has_qkv_bias,
        )
        self._output = linear(
            heads_width, [("self_attn.o_proj", spec.hidden_size)], has_bias=architecture.has_output_bias
        )
        self._gate_up = GatedLinear(
            spec.hidden_size,
            (f"{name}.mlp.gate_proj", inner),
            (f"{name}.mlp.up_proj", inner),
            has_bias=architecture.has_mlp_bias,
            dtype=dtype,
            device=device,
        )
        self._down = linear(inner, [("mlp.down_proj", spec.hidden_size)], has_bias=architecture.has_mlp_bias)

    def parameters(self) -> dict[str, torch.Tensor]:
        named = {
            f"{self._name}.input_layernorm.weight": self._attention_norm.weight,
            f"{self._name}.post_attention_layernorm.weight": self._mlp_norm.weight,
        }
        if self._qk_norm is not None:
            named[f"{self._name}.self_attn.q_norm.weight"] = self._qk_norm.weight[: self._num_heads]
            named[f"{self._name}.self_attn.k_norm.weight"] = self._qk_norm.weight[self._num_heads :]
        for linear in (self._qkv, self._output, self._gate_up, self._down):
            named.update(linear.parameters())
        return named

    def finish(self) -> None:
        num_rotated = (self._num_heads + self._num_kv_heads) * self._head_dim
        for rotated in (self._qkv.weight_ED, self._qkv.bias_E):
            if rotated is not None:
                rotated[:num_rotated] = interleave(rotated[:num_rotated], self._head_dim)
        if self._qk_norm is not None:
            flat = self._qk_norm.weight.view(-1)
            flat.copy_(interleave(flat, self._head_dim))
            self._qk_norm.finish()
        for part in (self._qkv, self._output, self._gate_up, self._down, self._attention_norm, self._mlp_norm):
            part.finish()

    def advance(self, x_TD: torch.Tensor, step: _Step) -> torch.Tensor:
        """`x_TD` with this layer's two contributions; the tensor given may be changed."""
        x_TD = self._output.add_to(x_TD, self._attend(self._attention_norm(x_TD), step))
        return self._down.add_to(x_TD, self._gate_up(self._mlp_norm(x_TD)))

    def _attend(self, x_TD: torch.Tensor, step: _Step) -> torch.Tensor:
        num_rows, num_tokens = x_TD.shape[0], step.num_tokens
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        qkv_TNH = self._qkv(x_TD).view(num_rows, num_heads + 2 * num_kv_heads, self._head_dim)
        qk_TNH = qkv_TNH[:, : num_heads + num_kv_heads]
        rotated_TNH = qk_TNH.float() if self._qk_norm is None else self._qk_norm.in_float32(qk_TNH)
        rotate_(rotated_TNH, step.cis_T1C)
        if rotated_TNH is not qk_TNH:
            qk_TNH.copy_(rotated_TNH)
        if num_rows > num_tokens:
            qkv_TNH = qkv_TNH[:num_tokens]
        out_TNH = step.context.attention.attend(
            qkv_TNH[:, :num_heads],
            qkv_TNH[:, num_heads:].unflatten(1, (2, num_kv_heads)),
            step.context.kv_cache[self._index],
            step.context.plan,
            scale=self._scale,
            window=self._window,
        )
        out_TD = out_TNH.reshape(num_tokens, -1)
        if num_rows > num_tokens:
            out_TD = F.pad(out_TD, (0, 0, 0, num_rows - num_tokens))
        return out_TD
