"""The networks of `tandem-image`, as StableDiffusion3Pipeline of diffusers names and stores them.

Two small CLIP text encoders read the prompt and there is no third. Where it is absent the pipeline appends rows of
zeros to the prompt, 256 unless it is told otherwise; the model is trained for any number of them (`NullRows`).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from models.embedded.captions import MAX_TOKENS, every_word
from models.embedded.image_autoencoder import CHANNELS, FACTOR, USUAL
from models.embedded.pictures import COLOURS, SHAPES

# Legend: B rows, T prompt tokens, N heads, S attended tokens, H head dimension

START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH, HEADS, LAYERS = 128, 4, 5
TEXT_WIDTH, TEXT_LAYERS = 64, 2
LARGEST_SIDE = 128
"""Pixels that the position table holds; trained are sides up to 96."""


def build_tokenizer() -> CLIPTokenizer:
    """One token for each known word, bytes for the rest. The merges are learned on the words alone, to the end."""
    words = sorted({*every_word(), *COLOURS, *SHAPES, "a", "an"})
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(words, trainer)
    merges: Any = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [START, END, *letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(vocabulary: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_attention_heads=2,
            num_hidden_layers=TEXT_LAYERS,
            projection_dim=TEXT_WIDTH,
            hidden_act="gelu",
            max_position_embeddings=MAX_TOKENS,
        )
    )


def build_transformer() -> Any:
    return SD3Transformer2DModel(
        sample_size=USUAL // FACTOR,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LARGEST_SIDE // FACTOR // 2,
        qk_norm="rms_norm",
    )


class NullRows:
    """Joint attention in which the last token of the prompt counts for `count`.

    Rows of zeros behind the prompt are all alike and stay alike, so one row whose score is raised by log(count) is
    attended to exactly as that many. Training needs one row instead of 256.
    """

    def __init__(self) -> None:
        self.bias = torch.zeros(())
        """log(count)"""

    def count(self, rows: int) -> None:
        self.bias = torch.tensor(math.log(rows))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(states: Tensor, norm: nn.Module | None) -> Tensor:
            states_BNSH = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return states_BNSH if norm is None else norm(states_BNSH)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        value = torch.cat([heads(attn.to_v(image), None), heads(attn.add_v_proj(text), None)], 2)
        # Written out: for these short sequences the backward pass of PyTorch's fused attention takes most of a step
        # (in bfloat16 on CPU 16 against 9 ms a picture).
        scores_BNSS = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        is_last_S = torch.arange(key.shape[2], device=key.device) == key.shape[2] - 1
        scores_BNSS = scores_BNSS.float() + is_last_S * self.bias.to(key.device)
        mixed_BNSH = scores_BNSS.softmax(-1).to(value.dtype) @ value
        mixed = mixed_BNSH.transpose(1, 2).flatten(2)
        image, text = mixed[:, : image.shape[1]], mixed[:, image.shape[1] :]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


class Denoiser(nn.Module):
    """Text encoders and transformer, the part that the second stage trains."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        self.text_encoder_2 = build_text_encoder(vocabulary)
        self.transformer = build_transformer()
        for block in self.transformer.transformer_blocks:  # as in DiT: every block begins as the identity
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def forward(self, latents: Tensor, sigma_B: Tensor, tokens_BT: Tensor) -> Tensor:
        """The velocity `noise - latents` as the pipeline would compute it, but with one row of zeros."""
        prompts, pooled = [], []
        for encoder in (self.text_encoder, self.text_encoder_2):
            output = encoder(tokens_BT, output_hidden_states=True)
            prompts.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        prompt = F.pad(torch.cat(prompts, -1), (0, 0, 0, 1))
        return self.transformer(latents, prompt, torch.cat(pooled, -1), 1000 * sigma_B, return_dict=False)[0]


def build_pipeline(autoencoder: Any, denoiser: Denoiser, tokenizer: CLIPTokenizer, shift: float) -> Any:
    return StableDiffusion3Pipeline(
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def store(pipeline: Any, folder: Path) -> None:
    """Write diffusers' layout with weights in float16. Configurations name float32, so that text encoders loaded
    without a dtype are computed in it, as the other parts are."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2"):
        file = folder / name / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": "float32"}
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
