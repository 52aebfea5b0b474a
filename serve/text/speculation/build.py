"""Puts speculation together from its options: which proposer, over which weights. The rest is `build.py`'s.

A draft model must have the target's vocabulary, token by token: its drafts are the target's input as they are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.attention.base import KVCacheSpec
from models.attention.build import make_attention
from models.text.base import CausalLM
from serve.errors import ConfigError
from serve.model_folder import find_model
from serve.options import ModelOptions, SpeculativeOptions
from serve.text.speculation.draft_model import DraftModel
from serve.text.speculation.prompt_lookup import PromptLookup
from serve.text.speculation.proposer import Proposer

DRAFTS = {"tandem-text": "tandem-text-draft"}
"""The drafts of models that ship, used unless speculation is configured."""


def speculation_of(options: ModelOptions) -> SpeculativeOptions | None:
    """What was asked for, else the default for this model; None for no speculation."""
    asked = options.speculative_config
    if asked is None and options.model in DRAFTS:
        asked = SpeculativeOptions(model=DRAFTS[options.model])
    return asked if asked is not None and asked.num_speculative_tokens else None


def draft_options(options: ModelOptions, speculation: SpeculativeOptions | None) -> ModelOptions | None:
    """The draft model as a model of its own, whole on the driver; None when no model drafts."""
    if speculation is None or speculation.model is None:
        return None
    return replace(
        options,
        model=speculation.model,
        revision=None,
        served_model_name=(),
        speculative_config=None,
        max_model_len=None,
        quantization=None,  # small beside the target; one that is stored quantised stays so
        tensor_parallel_size=1,  # the driver drafts alone, with the whole draft model
        pipeline_parallel_size=1,
    )


def check_draft(draft: CausalLM, target: CausalLM, draft_folder: Path, target_folder: Path) -> None:
    """Raise ConfigError unless both models mean the same by every token id."""
    if draft.spec.vocab_size != target.spec.vocab_size:
        raise ConfigError(
            f"speculative_config.model: {draft_folder.name!r} has a vocabulary of {draft.spec.vocab_size} tokens and "
            f"{target_folder.name!r} one of {target.spec.vocab_size}; give a draft model of the same family",
            param="speculative_config",
        )
    ours, theirs = _vocabulary(target_folder), _vocabulary(draft_folder)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(
            f"speculative_config.model: {draft_folder.name!r} and {target_folder.name!r} have different tokenizers "
            f"(tokenizer.json); give a draft model with the same one",
            param="speculative_config",
        )


def find_draft(options: ModelOptions) -> Path:
    """The folder of the draft model. Raises ConfigError that names the key."""
    try:
        return find_model(options, "text")[0]
    except ConfigError as error:
        raise ConfigError(f"speculative_config.{error.message}", param="speculative_config") from None


def draft_cache(options: ModelOptions, draft: CausalLM, device: torch.device) -> KVCacheSpec:
    spec = draft.spec
    return KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, options.block_size, spec.dtype, device)


def make_proposer(
    speculation: SpeculativeOptions,
    draft: CausalLM | None,
    cache: KVCacheSpec | None,
    *,
    num_blocks: int,
    max_num_tokens: int,
    overlaps: bool,
    max_rows_in_graph: int = 0,
    max_model_len: int = 0,
) -> Proposer:
    """`overlaps`: the next step is begun before the host knows what became of the drafts."""
    if draft is None or cache is None:
        return PromptLookup(speculation.prompt_lookup_min, speculation.prompt_lookup_max)
    rejects = speculation.rejection_sample_method == "standard"
    return DraftModel(
        draft,
        make_attention("auto", cache, draft.spec.num_heads),
        cache,
        num_blocks=num_blocks,
        max_num_tokens=max_num_tokens,
        rejects=rejects,
        runs_ahead=overlaps and not rejects,
        max_rows_in_graph=max_rows_in_graph if getattr(draft, "is_capturable", False) else 0,
        max_model_len=max_model_len,
    )


def _vocabulary(folder: Path) -> Any:
    """Token → id, and the added tokens; None without a `tokenizer.json`."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return data["model"]["vocab"], {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
