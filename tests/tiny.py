"""Tiny random text models in the layout of real checkpoints: config, model, byte-level tokenizer, folder on disk.

Everything is deterministic in its arguments. Norm weights and biases are random too, so that a test against
transformers notices when one of them is forgotten. `FAMILIES` have a native decoder, `HF_FAMILIES` go through `hf.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HF_FAMILIES = ("gemma2", "gpt_neox", "olmo2", "phi", "phi3", "stablelm")

EOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MERGES = ["t h", "th e", "i n", "a n", "an d", "Ġ the", "Ġ and", "e r", "o u", "Ġ a"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24},
    "olmo2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "stablelm": {"num_key_value_heads": 2},
}


def tiny_config(family: str = "qwen3", **overrides: Any) -> PreTrainedConfig:
    """A config of `family` (a transformers model type): two layers, hidden size 64, four heads, 512 positions."""
    values: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tiny_tokenizer().convert_tokens_to_ids(END),
        **_SPECIFIC.get(family, {}),
        **overrides,
    }
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str = "qwen3", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """transformers' model with random weights in float32, for evaluation with eager attention (the oracle)."""
    config = tiny_config(family, **overrides)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * config.initializer_range
            if parameter.dim() > 1:
                parameter.copy_(noise)
            else:
                parameter.add_(noise)
    return model


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ten merges and three special tokens; ends turns with `<|im_end|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = [tuple(merge.split()) for merge in MERGES]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (EOS, START, END)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=EOS, additional_special_tokens=[START, END]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_folder(
    path: Path,
    family: str = "qwen3",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """A checkpoint folder below `path`, as `save_pretrained` writes it, with tokenizer and chat template."""
    folder = path / f"tiny-{family}"
    model = tiny_model(family, seed=seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
