"""Forwards for diffusers' transformer blocks in which kernels do what is between matrix products. Imports Triton.

The modules stay diffusers' own, with their weights and shards. A norm with its scale and shift, four launches, becomes
one; a gated sum with the norm behind it, six, becomes one too; and so do norm, rotation and concatenation of queries or
keys, ten. Where there are no kernels a block's forward is diffusers' own, the reference.

Legend: R rows, T image tokens, S text tokens, D features, N heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels.modulate import gate_add, gate_add_modulate, modulate
from models.kernels.norm_rotate import norm_rotate_into
from models.kernels.rms_norm import rms_norm


def fuse_blocks(transformer: nn.Module) -> None:
    """Have the blocks of `transformer` compute so, if it is one of those, as far as they do what is done here."""
    if not isinstance(transformer, DiTTransformer2DModel | SD3Transformer2DModel | FluxTransformer2DModel):
        return
    for module in transformer.modules():
        if type(module) in _FORWARDS and not _has_more(module):
            module.forward = MethodType(_FORWARDS[type(module)], module)
        if isinstance(module, FluxAttention) and isinstance(module.processor, FluxAttnProcessor):
            module.set_processor(_FluxAttention())  # type: ignore[arg-type]  # any callable will do
    if isinstance(transformer, DiTTransformer2DModel):
        _project_times_once(transformer)


def _project_times_once(transformer: Any) -> None:
    """Every block has an embedding of time of its own, of the same ten sinusoids' launches: what it gets for a time is
    their result."""
    embeddings = [block.norm1.emb for block in transformer.transformer_blocks]
    project = embeddings[0].time_proj

    def projected(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, named | {"timestep": project(named["timestep"])}

    transformer.register_forward_pre_hook(projected, with_kwargs=True)
    for embedding in embeddings:
        embedding.time_proj = nn.Identity()


def _has_more(module: Any) -> bool:
    """Whether it does what the forward here leaves out: norms with weights, a second attention, positions."""
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    if any(norm.weight is not None for norm in norms):
        return True
    if isinstance(module, AdaLayerNormContinuous):
        return not norms
    if isinstance(module, RMSNorm):
        return module.weight is None or module.bias is not None
    if isinstance(module, BasicTransformerBlock):
        return module.norm_type != "ada_norm_zero" or module.attn2 is not None or module.pos_embed is not None
    return False


def _dit(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: Any = None,
    class_labels: Tensor | None = None,
) -> Tensor:
    """Of a class-conditional transformer."""
    x_RTD, norm = hidden_states, self.norm1
    emb_RD = norm.emb(timestep, class_labels, hidden_dtype=x_RTD.dtype)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = norm.linear(norm.silu(emb_RD)).chunk(6, dim=1)
    y_RTD = self.attn1(modulate(x_RTD, shift, scale, norm.norm.eps))
    x_RTD, normed_RTD = gate_add_modulate(x_RTD, gate, y_RTD, mlp_shift, mlp_scale, self.norm3.eps)
    return gate_add(x_RTD, mlp_gate, self.ff(normed_RTD))


def _joint(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, joint_attention_kwargs: Any = None
) -> tuple[Tensor | None, Tensor]:
    """Of Stable Diffusion 3: image and text side by side, in the last block without the text's feed-forward."""
    x_RTD, text_RSD = hidden_states, encoder_hidden_states
    if self.use_dual_attention:
        normed_RTD, gate, *mlp, second_RTD, second_gate = self.norm1(x_RTD, emb=temb)
    else:
        normed_RTD, gate, *mlp = self.norm1(x_RTD, emb=temb)
    if self.context_pre_only:
        normed_RSD = self.norm1_context(text_RSD, temb)
    else:
        normed_RSD, text_gate, *text_mlp = self.norm1_context(text_RSD, emb=temb)
    y_RTD, y_RSD = self.attn(
        hidden_states=normed_RTD, encoder_hidden_states=normed_RSD, **(joint_attention_kwargs or {})
    )
    if self.use_dual_attention:
        x_RTD = gate_add(x_RTD, gate, y_RTD)
        gate, y_RTD = second_gate, self.attn2(hidden_states=second_RTD, **(joint_attention_kwargs or {}))
    x_RTD = _feed_forward(x_RTD, gate, y_RTD, mlp, self.norm2, self.ff)
    if self.context_pre_only:
        return None, x_RTD
    return _feed_forward(text_RSD, text_gate, y_RSD, text_mlp, self.norm2_context, self.ff_context), x_RTD


def _flux(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> tuple[Tensor, Tensor]:
    """Of FLUX.1, image and text side by side."""
    normed_RTD, gate, *mlp = self.norm1(hidden_states, emb=temb)
    normed_RSD, text_gate, *text_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
    y_RTD, y_RSD = self.attn(
        hidden_states=normed_RTD, encoder_hidden_states=normed_RSD, image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )  # fmt: skip
    x_RTD = _feed_forward(hidden_states, gate, y_RTD, mlp, self.norm2, self.ff)
    text_RSD = _feed_forward(encoder_hidden_states, text_gate, y_RSD, text_mlp, self.norm2_context, self.ff_context)
    return _within_float16(text_RSD), x_RTD


def _flux_single(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> tuple[Tensor, Tensor]:
    """Of FLUX.1, text and image as one, attention beside feed-forward."""
    num_text = encoder_hidden_states.shape[1]
    x_RTD, norm = torch.cat([encoder_hidden_states, hidden_states], dim=1), self.norm
    shift, scale, gate = norm.linear(norm.silu(temb)).chunk(3, dim=1)
    normed_RTD = modulate(x_RTD, shift, scale, norm.norm.eps)
    inner_RTE = self.act_mlp(self.proj_mlp(normed_RTD))
    y_RTD = self.attn(hidden_states=normed_RTD, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x_RTD = gate_add(x_RTD, gate, self.proj_out(torch.cat([y_RTD, inner_RTE], dim=2)))
    x_RTD = _within_float16(x_RTD)
    return x_RTD[:, :num_text], x_RTD[:, num_text:]


class _FluxAttention:
    """A processor: of text and image together, the text's tokens first."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        cos, sin = image_rotary_emb
        parts = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
            parts.insert(0, (encoder_hidden_states, *added))
        query, key, value = (
            hidden_states.new_empty(len(hidden_states), len(cos), attn.heads, attn.head_dim) for _ in range(3)
        )
        start = 0
        for x_RTD, to_query, to_key, to_value, query_norm, key_norm in parts:
            own = slice(start, start + x_RTD.shape[1])
            for out, project, norm in ((query, to_query, query_norm), (key, to_key, key_norm)):
                x_RTNH = project(x_RTD).unflatten(-1, (attn.heads, attn.head_dim))
                norm_rotate_into(out[:, own], x_RTNH, norm.weight, norm.eps, cos[own], sin[own])
            value[:, own] = to_value(x_RTD).unflatten(-1, (attn.heads, attn.head_dim))
            start = own.stop
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed_RNTH = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed_RTD = mixed_RNTH.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed_RTD
        num_text = encoder_hidden_states.shape[1]
        # The second of to_out is the dropout of training.
        return attn.to_out[0](mixed_RTD[:, num_text:]), attn.to_add_out(mixed_RTD[:, :num_text])


def _feed_forward(
    x_RTD: Tensor, gate_RD: Tensor, y_RTD: Tensor, mlp: list[Tensor], norm: nn.LayerNorm, feed_forward: nn.Module
) -> Tensor:
    """What attention gave is added, normed and fed forward. `mlp`: shift, scale and gate of that."""
    shift, scale, mlp_gate = mlp
    x_RTD, normed_RTD = gate_add_modulate(x_RTD, gate_RD, y_RTD, shift, scale, norm.eps)
    return gate_add(x_RTD, mlp_gate, feed_forward(normed_RTD))


def _within_float16(x: Tensor) -> Tensor:
    """As diffusers does: FLUX.1 in float16 exceeds its range in places."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _norm_zero(
    self: Any, x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Any = None
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
    return modulate(x, shift, scale, self.norm.eps), *others


def _norm_zero_x(self: Any, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    """With a second scale and shift of the same norm, for a second attention."""
    shift, scale, *others, second_shift, second_scale, second_gate = self.linear(self.silu(emb)).chunk(9, dim=1)
    second = modulate(hidden_states, second_shift, second_scale, self.norm.eps)
    return modulate(hidden_states, shift, scale, self.norm.eps), *others, second, second_gate


def _norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulate(x, shift, scale, self.norm.eps)


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.eps)


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    BasicTransformerBlock: _dit,
    JointTransformerBlock: _joint,
    FluxTransformerBlock: _flux,
    FluxSingleTransformerBlock: _flux_single,
    AdaLayerNormZero: _norm_zero,
    SD35AdaLayerNormZeroX: _norm_zero_x,
    AdaLayerNormContinuous: _norm_continuous,
    RMSNorm: _rms_norm,
}
