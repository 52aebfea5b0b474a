"""How many KV blocks a replica gets, and how long a sequence may then be.

On CUDA the cache takes what `gpu_memory_utilization` leaves after weights, a full step and all graphs, as measured. On
CPU it is sized by need (some full-length sequences), within a share of the free memory: pages are taken when written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.attention.base import KVCacheSpec, TokenLayout
from models.staging import Staging
from models.text.base import CausalLM, StepContext
from serve.errors import ConfigError
from serve.options import ModelOptions
from serve.text.load import attention_of

log = logging.getLogger(__name__)

CPU_SEQUENCES_SHARE = 1 / 8
"""Full-length sequences the CPU cache holds, as a share of `max_num_seqs`."""
CPU_MEMORY_SHARE = 1 / 4
"""Of the free memory, at most."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    num_blocks: int
    max_model_len: int


def choose_cache_size(options: ModelOptions, spec: KVCacheSpec, *, max_positions: int, memory_bytes: int) -> CacheSize:
    """Blocks that fit `memory_bytes`, and the longest sequence to serve. Raises ConfigError when one does not fit."""
    if options.max_model_len is not None and options.max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len is {options.max_model_len}, but {options.model!r} was made for {max_positions} positions; "
            f"lower it",
            param="max_model_len",
        )
    wanted = options.max_model_len or max_positions
    num_blocks = memory_bytes // spec.block_bytes
    capacity = num_blocks * spec.block_size
    if capacity < (options.max_model_len or 1):
        needed = -(-wanted // spec.block_size) * spec.block_bytes
        if options.kv_cache_memory_bytes is not None:
            remedy = "kv_cache_memory_bytes"
        elif spec.device.type == "cuda":
            remedy = "gpu_memory_utilization"
        else:
            remedy = "the free memory, or set kv_cache_memory_bytes"
        raise ConfigError(
            f"the KV cache of {options.model!r} can have {memory_bytes / 2**20:.0f} MiB, which hold {capacity} "
            f"positions; one sequence of max_model_len {wanted} takes {needed / 2**20:.0f} MiB: lower max_model_len or "
            f"raise {remedy}",
            param="max_model_len",
        )
    return CacheSize(num_blocks, min(wanted, capacity))


def cache_bytes(
    options: ModelOptions,
    model: CausalLM,
    spec: KVCacheSpec,
    *,
    max_num_tokens: int,
    num_replicas_here: int,
    has_logits: bool = True,
    measure_graphs: Callable[[], int] = lambda: 0,
) -> int:
    """Memory for this rank's cache. On CUDA all ranks of a model measure together; `has_logits`: on its last stage.

    `measure_graphs`: what the CUDA graphs of a replica will take (`graph_memory.py`).
    """
    if spec.device.type == "cuda":
        if options.kv_cache_memory_bytes is not None:
            return options.kv_cache_memory_bytes
        num_scored = options.max_num_seqs if has_logits else 0
        step_bytes = _measure_step(options, model, spec, max_num_tokens=max_num_tokens, num_scored=num_scored)
        graph_bytes = measure_graphs()
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(spec.device)
        limit_bytes = int(total_bytes * options.gpu_memory_utilization)
        return cuda_cache_bytes(limit_bytes, total_bytes - free_bytes, step_bytes, graph_bytes)
    return cpu_cache_bytes(
        options,
        spec,
        max_positions=model.spec.max_positions,
        free_bytes=free_memory_bytes(),
        num_replicas_here=num_replicas_here * options.num_ranks,
    )


def cpu_cache_bytes(
    options: ModelOptions, spec: KVCacheSpec, *, max_positions: int, free_bytes: int, num_replicas_here: int
) -> int:
    """Memory for the CPU cache when no size is given. A replica of several ranks counts as so many."""
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    num_sequences = max(1, int(options.max_num_seqs * CPU_SEQUENCES_SHARE))
    blocks_each = -(-min(options.max_model_len or max_positions, max_positions) // spec.block_size)
    most = int(free_bytes * CPU_MEMORY_SHARE) // num_replicas_here
    return min(num_sequences * blocks_each * spec.block_bytes, most)


def cuda_cache_bytes(limit_bytes: int, held_bytes: int, step_bytes: int, graph_bytes: int) -> int:
    """What a replica may hold, less what is held (the weights, other processes), a step's peak and all graphs: those
    captured later, while the cache is full, find their memory too. 0 when that is more."""
    left = max(0, limit_bytes - held_bytes - step_bytes - graph_bytes)
    log.info(
        "device memory limit_bytes=%d held_bytes=%d step_bytes=%d graph_bytes=%d kv_cache_bytes=%d",
        *(limit_bytes, held_bytes, step_bytes, graph_bytes, left),
    )
    return left


def free_memory_bytes() -> int:
    """Memory this process could still take: the machine's, or what its control group leaves, whichever is less."""
    free = [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if limit and used and limit[0].isdigit():
        free.append(max(int(limit[0]) - int(used[0]), 0))
    return min(free) if free else 4 << 30


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


@torch.inference_mode()
def _measure_step(
    options: ModelOptions, model: CausalLM, spec: KVCacheSpec, *, max_num_tokens: int, num_scored: int
) -> int:
    """Peak bytes of one step with a full token budget and logits for `num_scored` rows, beyond what is held now.

    All sequences share the same few blocks: what is computed means nothing, what it takes is the same.
    """
    length = min(max_num_tokens, model.spec.max_positions)
    num_blocks = -(-length // spec.block_size)
    attention = attention_of(options, spec, model.rank_spec.num_heads)
    context_cache = attention.allocate(num_blocks)
    lengths = [length] * (max_num_tokens // length)
    if rest := max_num_tokens % length:
        lengths.append(rest)
    layout = TokenLayout(lengths, [0] * len(lengths), [list(range(num_blocks))] * len(lengths))
    positions = torch.cat([torch.arange(n, device=spec.device) for n in lengths])
    torch.cuda.synchronize(spec.device)
    torch.cuda.reset_peak_memory_stats(spec.device)
    held = torch.cuda.memory_allocated(spec.device)
    staging = Staging(spec.device)
    context = StepContext(attention, attention.plan(layout, staging), context_cache)
    staging.send()
    hidden_TD = model.forward(torch.zeros_like(positions), positions, context)
    if num_scored:
        logits_RV = model.logits(hidden_TD[:num_scored])
        logits_RV.softmax(-1).cumsum(-1).sort(-1)  # about what the sampler holds for rows with top-p
    torch.cuda.synchronize(spec.device)
    return torch.cuda.max_memory_allocated(spec.device) - held
