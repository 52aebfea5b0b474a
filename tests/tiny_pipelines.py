"""Tiny random diffusers pipelines: every class is the real one, every weight is random, nothing is downloaded.

Weights are random also where training starts at zero (the gates and the last layer of a diffusion transformer), and
large enough that pictures of two prompts differ by percents: otherwise tests of equality would pass for nothing.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LABELS = {
    "0": "tench, Tinca tinca",
    "1": "goldfish, Carassius auratus",
    "2": "great white shark, white shark",
    "7": "cock",
}


def dit_pipeline(**scheduler: Any) -> DiTPipeline:
    """Class-conditional, 32x32 pixels, with learned sigma."""
    transformer = DiTTransformer2DModel(
        sample_size=16,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return finish(
        DiTPipeline(
            transformer=transformer,
            vae=vae(),
            scheduler=DDIMScheduler(**{"clip_sample": False, **scheduler}),
            id2label=LABELS,
        )
    )


def sd3_pipeline(*, has_t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    """Text to image, 32x32 pixels by default, both CLIP encoders."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    clip, second = clip_tokenizer(), clip_tokenizer()
    t5 = t5_tokenizer() if has_t5 else None
    return finish(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=CLIPTextModelWithProjection(clip_config(clip)),
            tokenizer=clip,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(second)),
            tokenizer_2=second,
            text_encoder_3=t5_encoder(t5, 64) if t5 else None,
            tokenizer_3=t5,
        )
    )


def flux_pipeline() -> FluxPipeline:
    """A pipeline that no adapter of ours knows."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return finish(
        FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=CLIPTextModel(clip_config(clip)),
            tokenizer=clip,
            text_encoder_2=t5_encoder(t5, 32),
            tokenizer_2=t5,
        )
    )


def vae(**overrides: Any) -> AutoencoderKL:
    """Halves both sides."""
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **overrides,
    )


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        hidden_act="gelu",
        max_position_embeddings=77,
    )


def t5_tokenizer() -> T5Tokenizer:
    letters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def save(pipeline: Any, folder: Path) -> Path:
    """In diffusers' layout. The class names of `DiTPipeline` are written as its published checkpoints have them."""
    pipeline.save_pretrained(folder)
    if isinstance(pipeline, DiTPipeline):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "id2label": LABELS}))
    return folder


def finish(pipeline: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
            for name, parameter in module.named_parameters():
                deviation = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
                parameter.data.normal_(0.0, deviation, generator=generator)
                if parameter.dim() == 1 and name.endswith("weight"):
                    parameter.data.add_(1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
