"""A peer's side of a text model on several ranks: the driver's calls of the model, over its own weights and cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.attention.base import AttentionBackend
from models.parallel import Place
from models.staging import Staging
from models.text.base import CausalLM, StepContext
from serve.compute import SMALL_MODEL, keep_freed_memory, settle_threads, take_memory, use_huge_pages
from serve.options import ModelOptions
from serve.ranks.spec import PeerSpec
from serve.text.cache_size import cache_bytes
from serve.text.load import attention_of, cache_of, held_by, load_model
from serve.text.step_message import Step, StepDecoder


class TextWorker:
    """A `Worker`. `join`, `load`, `size` and `allocate` come first, the last three again for another model."""

    def __init__(self, spec: PeerSpec):
        self._rank = spec.rank
        self._threads = spec.threads
        self._device = torch.device(spec.device)
        self._options: ModelOptions
        self._place: Place
        self._model: CausalLM
        self._attention: AttentionBackend
        self._kv_cache: list[Any] = []
        self._staging = Staging(self._device)
        self._decoder = StepDecoder()
        self._idle_work: Iterator[bool] = iter(())

    def join(self, tensor_size: int, num_stages: int) -> dict[str, Any]:
        """Join the groups of the split."""
        self._place = Place.join(self._rank, tensor_size=tensor_size, num_stages=num_stages)
        return {}

    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        """Read this rank's weights. Raises ConfigError."""
        self._options = ModelOptions(**options)
        self._kv_cache = []
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers heeds it too; only the driver draws one
        keep_freed_memory()
        self._model = load_model(self._options, Path(folder), self._device, place=self._place)
        if self._is_large_on_cpu:
            use_huge_pages()
        settle_threads(self._options, self._threads, self._model.num_parameters)
        return held_by(self._model, self._device)

    def size(self, max_num_tokens: int, num_replicas_here: int) -> dict[str, Any]:
        """How many blocks this rank has memory for beside a step of `max_num_tokens`. All ranks measure together."""
        cache = cache_of(self._options, self._model, self._device)
        num_bytes = cache_bytes(
            self._options,
            self._model,
            cache,
            max_num_tokens=max_num_tokens,
            num_replicas_here=num_replicas_here,
            has_logits=self._place.is_last,
        )
        return {"num_blocks": num_bytes // cache.block_bytes}

    def allocate(self, num_blocks: int) -> dict[str, Any]:
        """`num_blocks` as the driver has them, the canary's included."""
        cache = cache_of(self._options, self._model, self._device)
        self._attention = attention_of(self._options, cache, self._model.rank_spec.num_heads)
        self._kv_cache = self._attention.allocate(num_blocks)
        self._decoder = StepDecoder()
        self._idle_work = take_memory(self._kv_cache) if self._is_large_on_cpu else iter(())
        return {}

    @torch.inference_mode()
    def run(self, payload: memoryview) -> None:
        if not payload:
            next(self._idle_work, None)
            return
        step = self._decoder.decode(payload)
        self._compute(step)

    def _compute(self, step: Step) -> None:
        put = self._staging.put
        ids_T, positions_T = put(step.token_ids, torch.int64), put(step.positions, torch.int64)
        context = StepContext(self._attention, self._attention.plan(step.layout, self._staging), self._kv_cache)
        wanted_R, pending_P = put(step.wanted, torch.int64), put(step.pending, torch.int64)
        copies = put(list(chain.from_iterable(zip(*step.copies))), torch.int64)
        self._staging.send()
        if step.copies:
            self._attention.copy_blocks(self._kv_cache, *copies.chunk(2))
        if step.pending:
            ids_T[pending_P] = self._receive_tokens(len(step.pending))
        hidden_TD = self._model.forward(ids_T, positions_T, context)
        if not self._place.is_last:
            return
        for first, stop in step.scored:
            self._model.logits(hidden_TD[first:stop])
        if step.wanted:
            self._model.logits(hidden_TD if step.wants_all else hidden_TD[wanted_R])

    def _receive_tokens(self, num: int) -> torch.Tensor:
        """What the step before sampled, from the driver: the first shard of this stage."""
        ids_P = torch.empty(num, dtype=torch.int64, device=self._device)
        dist.broadcast(ids_P, self._place.rank - self._place.tensor_rank, group=self._place.tensor_group)
        return ids_P

    @property
    def _is_large_on_cpu(self) -> bool:
        return self._device.type == "cpu" and self._model.num_parameters >= SMALL_MODEL
