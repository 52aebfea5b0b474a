"""The native decoder: one forward over the flat tokens of a step, for every `DenseArchitecture`.

Prefill chunks and decodes lie side by side in one [T, D] tensor; only attention knows which token belongs to which
sequence, through the context. Weights of one layer that read the same input are one matrix (q, k and v; gate and up).

Legend: T tokens of the step, D hidden size, N query heads, K key/value heads, H head dimension, R rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from models.attention.base import rotates
from models.layers import MIN_ROWS, Linear, Matrix, RMSNorm, SummedLinear
from models.parallel import ALONE, Place
from models.quantize import FLOAT, Quantization
from models.text.architecture import DenseArchitecture
from models.text.base import StepContext
from models.text.rope import RopeTable, interleave, rotate_
from models.text.share import Share
from models.weights import Cut, Progress, Storage, fill_dummy, load_weights


class Decoder:
    """A `CausalLM` with its weights. Uninitialised until `weights.py` has filled `parameters()`."""

    is_capturable = True
    """`forward` touches the device only, with the same operations for the same shapes: fit for CUDA graphs."""

    def __init__(
        self,
        architecture: DenseArchitecture,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_positions: int,
        quantization: Quantization = FLOAT,
    ):
        spec = architecture.spec
        self.spec = self.rank_spec = replace(spec, dtype=dtype)
        self.architecture = architecture
        self.device = device
        self._embedding_VD = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        share = Share.of(architecture)
        self._layers = [
            DecoderLayer(index, architecture, share, dtype=dtype, device=device, quantization=quantization)
            for index in share.layers
        ]
        self._norm = RMSNorm((spec.hidden_size,), architecture.norm_eps, dtype=dtype, device=device)
        self._head = Linear(
            spec.hidden_size, [("lm_head", spec.vocab_size)], has_bias=False, dtype=dtype, device=device
        )
        if architecture.ties_embeddings:
            self._head.weight_ED = self._embedding_VD
        self._min_rows = MIN_ROWS if device.type == "cpu" else 1
        self._rope = RopeTable(architecture.rope, num_positions=num_positions, device=device)
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters().values())
        self.weight_bytes = sum(parameter.nbytes for parameter in self.parameters().values())
        self.num_bytes_read = 0
        """Of the checkpoint's files, by `load`."""

    def parameters(self) -> dict[str, Storage]:
        """Checkpoint name → the storage it fills."""
        named: dict[str, Storage] = {
            "model.embed_tokens.weight": self._embedding_VD,
            "model.norm.weight": self._norm.weight,
        }
        for layer in self._layers:
            named.update(layer.parameters())
        if not self.architecture.ties_embeddings:
            named.update(self._head.parameters())
        return named

    @property
    def unused_names(self) -> tuple[str, ...]:
        """What a checkpoint may hold without a place here: tied embeddings stored twice."""
        return ("lm_head.weight",) if self.architecture.ties_embeddings else ()

    def cuts(self) -> dict[str, Cut]:
        """Which of `parameters()` are parts of a tensor of the checkpoint."""
        return {}

    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor the checkpoint must hold."""
        return {name: parameter.shape for name, parameter in self.parameters().items()}

    def load(self, folder: Path, *, load_format: str, progress: Progress | None = None) -> None:
        """Fill the weights from the files in `folder`, or with random numbers ("dummy"), and `finish`."""
        parameters, cuts, whole = self.parameters(), self.cuts(), self.shapes()
        if load_format == "dummy":
            fill_dummy(parameters, cuts=cuts, whole=whole, progress=progress)
        else:
            self.num_bytes_read = load_weights(
                folder, parameters, cuts=cuts, whole=whole, unused=self.unused_names, progress=progress
            )
        self.finish()

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
        x_TD, owed_TD = self._begin(token_ids_T), None
        step = DecoderStep(context, self._rope.at(positions_T), num_tokens)
        for layer in self._layers:
            x_TD, owed_TD = layer.advance(x_TD, owed_TD, step)
        return self._end(x_TD, owed_TD)[:num_tokens]

    def _begin(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """What the first layer here gets."""
        return F.embedding(token_ids_T, self._embedding_VD)

    def _end(self, x_TD: torch.Tensor, owed_TD: torch.Tensor | None) -> torch.Tensor:
        """What the last layer here gave, made fit for `logits`."""
        return self._norm.after(x_TD, owed_TD)[1]

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        num_rows = hidden_RD.shape[0]
        if num_rows < self._min_rows:
            hidden_RD = F.pad(hidden_RD, (0, 0, 0, self._min_rows - num_rows))
        return self._head(hidden_RD)[:num_rows].float()


@dataclass(frozen=True, slots=True)
class DecoderStep:
    """What the layers of one forward share. Rows from `num_tokens` on are padding, of no sequence."""

    context: StepContext
    cis_T1C: torch.Tensor
    num_tokens: int


class DecoderLayer:
    """Attention and feed-forward, each normed before and added after; of a shard, some heads and features of both."""

    def __init__(
        self,
        index: int,
        architecture: DenseArchitecture,
        share: Share,
        place: Place = ALONE,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = FLOAT,
    ):
        spec, inner = architecture.spec, len(share.inner)
        name = f"model.layers.{index}"
        self._num_heads, self._num_kv_heads, self._head_dim = len(share.heads), len(share.kv_heads), spec.head_dim
        heads_width, kv_width = self._num_heads * spec.head_dim, self._num_kv_heads * spec.head_dim

        def linear(in_features: int, parts: list[tuple[str, int]], *, has_bias: bool) -> Matrix:
            named = [(f"{name}.{part}", size) for part, size in parts]
            return quantization.linear(in_features, named, has_bias=has_bias, dtype=dtype, device=device)

        def output(in_features: int, part: str, *, has_bias: bool) -> Matrix | SummedLinear:
            own = linear(in_features, [(part, spec.hidden_size)], has_bias=has_bias and place.tensor_rank == 0)
            return own if place.tensor_size == 1 else SummedLinear(own, place)

        def norm(*shape: int) -> RMSNorm:
            return RMSNorm(shape, architecture.norm_eps, dtype=dtype, device=device)

        self._cache_index, self._name, self._share = index - share.layers.start, name, share
        self._scale, self._device = spec.head_dim**-0.5, device
        self._window = architecture.windows[index]
        self._norm_eps = architecture.norm_eps
        self._attention_norm, self._mlp_norm = norm(spec.hidden_size), norm(spec.hidden_size)
        # One row per query and key head, so that both are normed in one call.
        num_rotated = self._num_heads + self._num_kv_heads
        self._qk_norm = norm(num_rotated, spec.head_dim) if architecture.has_qk_norm else None
        self._qkv = linear(
            spec.hidden_size,
            [("self_attn.q_proj", heads_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)],
            has_bias=architecture.has_qkv_bias,
        )
        self._output = output(heads_width, "self_attn.o_proj", has_bias=architecture.has_output_bias)
        self._gate_up = quantization.gated(
            spec.hidden_size,
            (f"{name}.mlp.gate_proj", inner),
            (f"{name}.mlp.up_proj", inner),
            has_bias=architecture.has_mlp_bias,
            dtype=dtype,
            device=device,
        )
        self._down = output(inner, "mlp.down_proj", has_bias=architecture.has_mlp_bias)

    def parameters(self) -> dict[str, Storage]:
        named: dict[str, Storage] = {
            f"{self._name}.input_layernorm.weight": self._attention_norm.weight,
            f"{self._name}.post_attention_layernorm.weight": self._mlp_norm.weight,
        }
        if self._qk_norm is not None:
            named[f"{self._name}.self_attn.q_norm.weight"] = self._qk_norm.weight[: self._num_heads]
            named[f"{self._name}.self_attn.k_norm.weight"] = self._qk_norm.weight[self._num_heads :]
        for linear in (self._qkv, self._output, self._gate_up, self._down):
            named.update(linear.parameters())
        return named

    def cuts(self) -> dict[str, Cut]:
        """Where a shard lies in the checkpoint: rows by head and feature, columns where products are summed."""
        heads, kv_heads, inner = (
            part.start * width
            for part, width in (
                (self._share.heads, self._head_dim),
                (self._share.kv_heads, self._head_dim),
                (self._share.inner, 1),
            )
        )
        qkv = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        at = [
            *((self._qkv, 0, f"self_attn.{part}", start) for part, start in qkv.items()),
            *((self._gate_up, 0, f"mlp.{part}", inner) for part in ("gate_proj", "up_proj")),
            (self._output, 1, "self_attn.o_proj", heads),
            (self._down, 1, "mlp.down_proj", inner),
        ]
        cuts = {}
        for matrix, dim, part, start in at:
            cuts.update(matrix.cuts(f"{self._name}.{part}", dim, start))
        return cuts

    def finish(self) -> None:
        num_rotated = (self._num_heads + self._num_kv_heads) * self._head_dim
        order_E = torch.arange(num_rotated + self._num_kv_heads * self._head_dim, device=self._device)
        order_E[:num_rotated] = interleave(order_E[:num_rotated], self._head_dim)
        self._qkv.reorder(order_E)
        if self._qk_norm is not None:
            flat = self._qk_norm.weight.view(-1)
            flat.copy_(interleave(flat, self._head_dim))
            self._qk_norm.finish()
        for part in (self._qkv, self._output, self._gate_up, self._down, self._attention_norm, self._mlp_norm):
            part.finish()

    def advance(
        self, x_TD: torch.Tensor, owed_TD: torch.Tensor | None, step: DecoderStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream with this layer's two contributions. `x_TD` may be changed.

        What is owed to the stream is a contribution that the next norm adds to it in passing, where that is cheaper.
        """
        x_TD, normed_TD = self._attention_norm.after(x_TD, owed_TD)
        x_TD, owed_TD = self._output.add_to(x_TD, self._attend(normed_TD, step))
        x_TD, normed_TD = self._mlp_norm.after(x_TD, owed_TD)
        return self._down.add_to(x_TD, self._gate_up(normed_TD))

    def _attend(self, x_TD: torch.Tensor, step: DecoderStep) -> torch.Tensor:
        num_rows, num_tokens = x_TD.shape[0], step.num_tokens
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        qkv_TNH = self._qkv(x_TD).view(num_rows, num_heads + 2 * num_kv_heads, self._head_dim)
        attention, plan, kv = step.context.attention, step.context.plan, step.context.kv_cache[self._cache_index]
        if rotates(attention):
            if num_rows > num_tokens:
                qkv_TNH = qkv_TNH[:num_tokens]
            norm = None if self._qk_norm is None else (self._qk_norm.weight, self._norm_eps)
            attention.rotate_and_store(qkv_TNH, step.cis_T1C[:num_tokens], norm, kv, plan)
            q_TNH = qkv_TNH[:, :num_heads]
            out_TNH = attention.attend_stored(q_TNH, kv, plan, scale=self._scale, window=self._window)
        else:
            self._rotate_(qkv_TNH[:, : num_heads + num_kv_heads], step.cis_T1C)
            if num_rows > num_tokens:
                qkv_TNH = qkv_TNH[:num_tokens]
            q_TNH, new_T2KH = qkv_TNH[:, :num_heads], qkv_TNH[:, num_heads:].unflatten(1, (2, num_kv_heads))
            out_TNH = attention.attend(q_TNH, new_T2KH, kv, plan, scale=self._scale, window=self._window)
        out_TD = out_TNH.reshape(num_tokens, -1)
        if num_rows > num_tokens:
            out_TD = F.pad(out_TD, (0, 0, 0, num_rows - num_tokens))
        return out_TD

    def _rotate_(self, qk_TNH: torch.Tensor, cis_T1C: torch.Tensor) -> None:
        """Norm, where there is one, and rotate queries and keys in place."""
        rotated_TNH = qk_TNH.float() if self._qk_norm is None else self._qk_norm.in_float32(qk_TNH)
        rotate_(rotated_TNH, cis_T1C)
        if rotated_TNH is not qk_TNH:
            qk_TNH.copy_(rotated_TNH)
