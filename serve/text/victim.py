"""Who is preempted when memory is short: the lowest priority and, among those, the least loss for what it frees."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from serve.engine.job import Job
from serve.engine.waiting import AGING_S
from serve.text.kv_cache import KVCache
from serve.text.sequence import Sequence


def choose_victim(candidates: SequenceOf[Sequence], kv_cache: KVCache, policy: Callable[[Job], float]) -> Sequence:
    """Of `candidates`, in order of admission. Of equals the one admitted last."""

    def cost(seq: Sequence) -> tuple[float, float]:
        """Urgency in whole priority levels, waiting included (so nobody is the victim for ever), then loss per gain."""
        num_blocks = sum(len(part.blocks) for part in seq.holders)
        num_freed = kv_cache.num_unshared([part.blocks for part in seq.holders])
        num_lost = sum(part.num_computed for part in seq.holders) - (num_blocks - num_freed) * kv_cache.block_size
        return -(policy(seq) // AGING_S), num_lost / num_freed if num_freed else float("inf")

    return min(reversed(candidates), key=cost)
