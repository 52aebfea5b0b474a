"""The contract's scenarios: both fake schedulers, and the real one over tokens."""

from __future__ import annotations

from typing import Any

from contract import Arrival
from fakes import (
    EOS,
    VOCAB,
    FakeDenoiseRunner,
    FakeDenoiseScheduler,
    FakeTokenRunner,
    FakeTokenScheduler,
    FakeTrajectory,
    Saboteur,
    continuation,
    denoised,
    sequence,
)

from serve.engine.job import Job
from serve.text.kv_cache import KVCache
from serve.text.scheduler import TokenScheduler


def prompt_of(arrival: Arrival) -> list[int]:
    """Some prompt tokens; arrivals of equal priority have equal beginnings."""
    return [(3 * position + arrival.priority) % VOCAB for position in range(arrival.size)]


class FakeTokens:
    """Few cells, so that most plans preempt; a budget below most prompts, so that they are chunked."""

    max_jobs = 4
    max_work = 8
    patience = 12
    is_strict = True

    def __init__(self) -> None:
        self.saboteur = Saboteur()
        self.scheduler = FakeTokenScheduler(num_cells=30, max_num_seqs=4, max_num_batched_tokens=8)
        self.runner = FakeTokenRunner(saboteur=self.saboteur)

    def job(self, job_id: str, arrival: Arrival) -> Job:
        return sequence(
            job_id, prompt_of(arrival), arrival.length, priority=arrival.priority, timeout_s=arrival.timeout_s
        )

    def expected(self, arrival: Arrival) -> list[int]:
        return continuation(prompt_of(arrival), arrival.length)

    def flatten(self, outputs: list[Any]) -> list[int]:
        return [token for output in outputs for token in output.token_ids]

    def check_conserved(self) -> None:
        scheduler = self.scheduler
        held = [cell for seq in scheduler.running for cell in seq.blocks]
        dying = [cell for cells in scheduler.dying.values() for cell in cells]
        assert sorted(held + dying + scheduler.free) == list(range(scheduler.num_cells))

    def check_all_free(self) -> None:
        assert len(self.scheduler.free) == self.scheduler.num_cells
        assert not self.runner.sampled and not self.runner.in_flight


class Tokens:
    """The real scheduler with prefix sharing: small blocks, too few of them for all, prompts that begin alike."""

    max_jobs = 4
    max_work = 9
    patience = 12
    is_strict = False  # who waits for a prefix that another one computes is overtaken
    has_prefix_caching = True
    num_stages = 1

    def __init__(self) -> None:
        self.saboteur = Saboteur()
        self.cache = KVCache(num_blocks=11, block_size=3, enable_prefix_caching=self.has_prefix_caching)
        self.scheduler = TokenScheduler(
            self.cache,
            max_num_seqs=4,
            max_num_batched_tokens=9,
            max_model_len=64,
            eos_token_ids=[EOS],
            vocab_size=VOCAB,
            num_stages=self.num_stages,
        )
        self.runner = FakeTokenRunner(block_size=3, saboteur=self.saboteur)

    job = FakeTokens.job
    expected = FakeTokens.expected
    flatten = FakeTokens.flatten

    def check_conserved(self) -> None:
        running = [block for seq in self.scheduler._running for block in seq.blocks]
        dying = [block for tables in self.scheduler._freed_with.values() for table in tables for block in table]
        assert self.cache.num_free + len({*running, *dying}) == self.cache.num_blocks

    def check_all_free(self) -> None:
        assert self.cache.num_free == self.cache.num_blocks
        assert not self.runner.sampled and not self.runner.in_flight


class TokensUnshared(Tokens):
    """The real scheduler without prefix sharing: strictly by policy."""

    is_strict = True
    has_prefix_caching = False


class TokensInStages(TokensUnshared):
    """Four batches at a time, one in each stage of a pipeline."""

    num_stages = 4


class FakeLatents:
    """More jobs than slots, more slots than fit into a batch, several shapes."""

    max_jobs = 3
    max_work = 3 * 12
    patience = 4
    is_strict = False  # a later job of a fitting shape rides along

    def __init__(self) -> None:
        self.saboteur = Saboteur()
        self.scheduler = FakeDenoiseScheduler(num_slots=5, max_batch=3)
        self.runner = FakeDenoiseRunner(saboteur=self.saboteur)

    def job(self, job_id: str, arrival: Arrival) -> Job:
        return FakeTrajectory(
            id=job_id,
            shape=arrival.size,
            num_steps=arrival.length,
            priority=arrival.priority,
            timeout_s=arrival.timeout_s,
        )

    def expected(self, arrival: Arrival) -> list[int]:
        return denoised(arrival.size, arrival.length)

    def flatten(self, outputs: list[Any]) -> list[int]:
        return outputs

    def check_conserved(self) -> None:
        assert 0 <= self.scheduler.num_free <= self.scheduler.num_slots

    def check_all_free(self) -> None:
        assert self.scheduler.num_free == self.scheduler.num_slots
        assert not self.runner.latents and not self.runner.in_flight
