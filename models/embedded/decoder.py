"""The decoder as it is trained: Qwen3's layout, with transformers' parameter names, so that the weights need no
conversion.

A plain module because training on one CPU core wants few, large, bf16 operations: sequences without padding masks (a
causal mask suffices when padding is on the right), and logits only where there is a target.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.embedded.bpe import CONTEXT_TOKENS, END_OF_TEXT, IM_END, PAD, VOCAB_SIZE

# Legend: B sequences, T positions, N query and K key/value heads, H head dimension, D hidden, V vocabulary, S targets

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
UNFUSED_UP_TO = 384
"""Positions up to which CPU attention is written out; see `attend`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """The size of a decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int


SHAPES = {
    "tandem-text": DecoderShape(hidden=192, layers=6, heads=6, kv_heads=2, head_dim=32, mlp=512),
    "tandem-text-draft": DecoderShape(hidden=96, layers=3, heads=4, kv_heads=2, head_dim=32, mlp=224),
}


class Attention(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=NORM_EPS)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        s = self.shape
        q_BTNH = self.q_norm(self.q_proj(x_BTD).view(batch, length, s.heads, s.head_dim))
        k_BTKH = self.k_norm(self.k_proj(x_BTD).view(batch, length, s.kv_heads, s.head_dim))
        v_BTKH = self.v_proj(x_BTD).view(batch, length, s.kv_heads, s.head_dim)
        q_BNTH = rotate(q_BTNH.transpose(1, 2), cos_TH, sin_TH)
        k_BKTH = rotate(k_BTKH.transpose(1, 2), cos_TH, sin_TH)
        group = s.heads // s.kv_heads
        k_BNTH = k_BKTH.repeat_interleave(group, dim=1)
        v_BNTH = v_BTKH.transpose(1, 2).repeat_interleave(group, dim=1)
        out_BNTH = attend(q_BNTH, k_BNTH, v_BNTH)
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(batch, length, s.heads * s.head_dim))


def attend(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """Causal attention. Short rows write their scores out: on CPU the backward of the fused kernel took a third of a
    training step at 84 positions, more than all matrix products of the attention layers."""
    length = q_BNTH.shape[2]
    if length > UNFUSED_UP_TO or q_BNTH.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
    hidden_TT = torch.full((length, length), -torch.inf, dtype=q_BNTH.dtype).triu(1)
    scores_BNTT = torch.matmul(q_BNTH * q_BNTH.shape[-1] ** -0.5, k_BNTH.transpose(2, 3)) + hidden_TT
    return torch.matmul(scores_BNTT.softmax(dim=-1), v_BNTH)


class MLP(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=NORM_EPS)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=NORM_EPS)
        self.mlp = MLP(shape)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TH, sin_TH)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Trunk(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=NORM_EPS)


class Decoder(nn.Module):
    """Tied embeddings, no biases. `state_dict()` has the names of `Qwen3ForCausalLM`, less the tied head."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        for parameter_name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Residual branches start small, so that depth does not grow the variance (as in GPT-2).
                scale = (
                    (2 * shape.layers) ** -0.5 if "o_proj" in parameter_name or "down_proj" in parameter_name else 1.0
                )
                nn.init.normal_(parameter, std=0.02 if "embed" in parameter_name else scale * shape.hidden**-0.5)

    def forward(self, tokens_BT: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Logits at the flat positions `positions_S`, or at all: (S, V) or (B, T, V)."""
        hidden_BTD = self.model.embed_tokens(tokens_BT)
        cos_TH, sin_TH = rope_tables(tokens_BT.shape[1], self.shape.head_dim, hidden_BTD)
        for layer in self.model.layers:
            hidden_BTD = layer(hidden_BTD, cos_TH, sin_TH)
        if positions_S is not None:
            hidden_BTD = hidden_BTD.flatten(0, 1).index_select(0, positions_S)
        return F.linear(self.model.norm(hidden_BTD), self.model.embed_tokens.weight)


def rope_tables(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions 0 to `length`, in the dtype and on the device of `like`."""
    inverse = ROPE_THETA ** -(torch.arange(0, head_dim, 2, device=like.device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=like.device).float(), inverse).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotary positions on the two halves of the head, as in Llama's and Qwen's checkpoints."""
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos_TH + torch.cat((-second, first), dim=-1) * sin_TH


def write_checkpoint(folder: Path, shape: DecoderShape, state: dict[str, Tensor], ids: dict[str, int]) -> None:
    """config.json, generation_config.json and model.safetensors in transformers' layout; weights are stored in float16,
    which halves the files and changes no measured answer, and are computed in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": ids[IM_END],
        "pad_token_id": ids[PAD],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": [ids[IM_END], ids[END_OF_TEXT]], "pad_token_id": ids[PAD], "max_new_tokens": 256}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def read_decoder(folder: Path) -> Decoder:
    """A decoder from the files `write_checkpoint` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    shape = DecoderShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp=config["intermediate_size"],
    )
    decoder = Decoder(shape)
    decoder.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return decoder
