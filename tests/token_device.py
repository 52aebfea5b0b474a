"""A fake device for tokens: no model, but a memory. What it samples is a hash of the tokens it finds in the blocks.

A scheduler that shares, frees or reuses a block wrongly makes it read other tokens than the sequence's own, and the
outputs differ from `tokens_alone`. Batches are computed when they are collected, as late as a real device may. Drafts
are what it is going to sample, spoilt here and there, so that any number of them is accepted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from zlib import crc32

import numpy as np
from beams import Found, group_oracle, plain_oracle

from serve.engine.interface import DeviceFault
from serve.events import TokenLogprobs
from serve.request import BeamParams, SamplingParams
from serve.text.beam_group import BeamGroup
from serve.text.kv_cache import KVCache
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import PENDING, Sequence, TokenBatch, TokenOutput
from serve.text.speculative import until_rejected

VOCAB = 13
EOS = 0


def make_scheduler(num_blocks=64, block_size=4, **options) -> TokenScheduler:
    caching = options.pop("enable_prefix_caching", True)
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256}
    return TokenScheduler(
        KVCache(num_blocks, block_size, caching), **defaults | options, eos_token_ids=[EOS], vocab_size=VOCAB
    )


def sequence(prompt, name="a", *, arrival=0.0, priority=0, salt="", prompt_logprobs=None, **sampling) -> Sequence:
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True} | sampling)
    return Sequence(
        id=name, token_ids=list(prompt), num_prompt=len(prompt), sampling=params,
        arrival=arrival, priority=priority, cache_salt=salt, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip


def beam_group(
    prompt, num_beams, name="a", *, num_returned=1, arrival=0.0, priority=0, salt="", **sampling
) -> BeamGroup:
    """`sampling` may have the other fields of `BeamParams` as well."""
    ours = {field.name: sampling.pop(field.name) for field in fields(BeamParams) if field.name in sampling}
    beams = BeamParams(num_beams=num_beams, **ours)
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True} | sampling, beams=beams)
    return BeamGroup(
        id=name, token_ids=list(prompt), num_prompt=len(prompt), sampling=params,
        arrival=arrival, priority=priority, cache_salt=salt, num_returned=num_returned,
    )  # fmt: skip


def next_token(token_ids: list[int], seed: int) -> int:
    return crc32(array("i", token_ids).tobytes(), seed) % VOCAB


def logprob_of(token_ids: list[int]) -> TokenLogprobs:
    """Of the last token, given those before it."""
    return TokenLogprobs(token_ids[-1], -crc32(array("i", token_ids).tobytes()) / 2**32, 1)


def tokens_alone(prompt: list[int], sampling: SamplingParams) -> list[int]:
    """The oracle: what a sequence generates, by the definition of its parameters."""
    end_ids = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        token_id = next_token(prompt + output, sampling.seed)
        if token_id in end_ids and len(output) >= sampling.min_tokens:
            break
        output.append(token_id)
    return output


def candidates(token_ids: list[int], job: Sequence, num: int) -> list[tuple[int, float]]:
    """The `num` likeliest tokens to follow for a beam: log-probabilities are a hash of the tokens, in float32."""
    is_early = len(token_ids) - job.num_prompt < job.sampling.min_tokens
    scores = logprobs_after(token_ids, job.sampling.seed)
    possible = [entry for entry in enumerate(scores) if not (is_early and entry[0] in job.end_ids)]
    return sorted(possible, key=lambda entry: -entry[1])[:num]


def logprobs_after(token_ids: list[int], seed: int) -> list[float]:
    state = crc32(array("i", token_ids).tobytes(), seed)
    return [-(crc32(bytes([token_id]), state) >> 8) / 2**23 for token_id in range(VOCAB)]


def beams_alone(prompt: list[int], sampling: SamplingParams) -> list[Found]:
    """The oracle: all hypotheses, by the definition of the parameters."""
    end_ids = {*sampling.stop_token_ids} | (set() if sampling.ignore_eos else {EOS})

    def model(output: tuple[int, ...]) -> np.ndarray:
        logprobs = np.array(logprobs_after([*prompt, *output], sampling.seed), dtype=np.float32)
        if len(output) < sampling.min_tokens:
            logprobs[list(end_ids)] = -np.inf
        return logprobs

    assert sampling.beams is not None
    oracle = plain_oracle if sampling.beams.num_beam_groups == 1 else group_oracle
    return oracle(cache(model), sampling.beams, end_ids, sampling.max_tokens)


def guess(job: Sequence, num_drafts: int) -> list[int]:
    """Drafts: the job's next tokens, up to one that is wrong in a fifth of the places; fewer than asked for where a
    proposer would know nothing."""
    known = list(job.token_ids)
    for _ in range(crc32(array("i", known).tobytes(), 2) % (2 * num_drafts)):
        if len(known) == len(job.token_ids) + num_drafts:
            break
        is_wrong = crc32(array("i", known).tobytes(), 1) % 5 == 0
        known.append((next_token(known, job.sampling.seed) + is_wrong) % VOCAB)
    return known[len(job.token_ids) :]


class RandomLength:
    """A `DraftLength` that follows no rule but a seed, another number every step."""

    def __init__(self, most: int, seed: int = 0):
        self._most = most
        self._state = seed
        self.num_observed = 0

    def choose(self, num_rows: int) -> int:
        return crc32(array("i", [self._state, num_rows]).tobytes()) % (self._most + 1)

    def observe(self, batch: TokenBatch, output: TokenOutput) -> None:
        self._state += 1


def require(holds: bool, otherwise: str) -> None:
    """A breach of the scheduler's contract ends the engine, where an AssertionError would count as a failing batch."""
    if not holds:
        raise DeviceFault(otherwise)


class TokenDevice:
    """A `Runner`. `fails(batch)` decides whether computing a batch raises. `is_staged`: it has several stages, which
    know no token of a batch that has not left the last one."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        fails: Callable[[TokenBatch], bool] = lambda batch: False,
        *,
        is_staged: bool = False,
    ):
        self.block_size = block_size
        self.batches: list[TokenBatch] = []
        self.num_checks = 0
        self._fails = fails
        self._is_staged = is_staged
        self._memory: list[int | None] = [None] * (num_blocks * block_size)
        self._last: dict[str, int] = {}
        self._unsettled: list[tuple[TokenBatch, list[list[int]]]] = []

    def submit(self, batch: TokenBatch) -> tuple[TokenBatch, list[list[int]]]:
        self.batches.append(batch)
        require(bool(batch.rows), "an empty batch")
        tables = []
        for row in batch.rows:
            end = row.start + len(row.token_ids) + row.num_drafts
            require(bool(row.token_ids), "a row without tokens")
            require(PENDING not in row.token_ids[:-1], "a pending token that is not the last")
            require(not self._is_staged or PENDING not in row.token_ids, "a pending token between stages")
            num_missing = row.start + len(row.token_ids) - len(row.job.token_ids)
            require(num_missing < 2 or not row.job.sampling.needs_history, "a history with a gap")
            tables.append(row.block_table[: -(-end // self.block_size)])
            require(len(tables[-1]) * self.block_size >= end, "a row without room")
            if row.num_drafts:
                require(row.samples and row.token_ids == row.job.token_ids[row.start :], "drafts behind unknown tokens")
                row.drafts = guess(row.job, row.num_drafts)
        for earlier, earlier_tables in self._unsettled:
            for a, a_table in zip(earlier.rows, earlier_tables):
                written = set(a_table[a.start // self.block_size :])
                for b, b_table in zip(batch.rows, tables):
                    is_safe = a.job.owner is b.job.owner or not written & set(b_table)
                    require(is_safe, "a block that a step in flight may still write")
        self._unsettled.append((batch, tables))
        return self._unsettled[-1]

    def collect(self, handle: tuple[TokenBatch, list[list[int]]]) -> TokenOutput:
        batch, tables = self._unsettled.pop(0)
        require(batch is handle[0], "collected out of order")
        if self._fails(batch):
            raise RuntimeError("this batch fails")
        slots = [[block * self.block_size + i for block in table for i in range(self.block_size)] for table in tables]
        for source, target in batch.copies:
            for i in range(self.block_size):
                self._memory[target * self.block_size + i] = self._memory[source * self.block_size + i]
        for row, slots_of_row in zip(batch.rows, slots):
            for position, token_id in enumerate(row.token_ids + row.drafts, row.start):
                self._memory[slots_of_row[position]] = self._last.get(row.job.id) if token_id == PENDING else token_id
        output = TokenOutput([], [], [])
        for i, (row, slots_of_row) in enumerate(zip(batch.rows, slots)):
            end = row.start + len(row.token_ids)
            seen = [self._memory[slot] for slot in slots_of_row[: end + len(row.drafts)]]
            known = [-2 if token_id is None else token_id for token_id in seen]
            sampled: tuple[int, ...] = ()
            if row.samples and row.num_candidates:
                output.candidates[i] = candidates(known, row.job, row.num_candidates)
            elif row.samples:
                require(row.sample_position == end, "a wrong position of the random stream")
                seed = row.job.sampling.seed
                drawn = [next_token(known[: end + i], seed) for i in range(len(row.drafts) + 1)]
                sampled = until_rejected(drawn, row.drafts)
                self._last[row.job.id] = sampled[-1]
            wants_logprobs = sampled and row.job.sampling.logprobs is not None
            full = [*known[:end], *sampled]
            entries = tuple(logprob_of(full[: i + 1]) for i in range(end, len(full)))
            output.token_ids.append(sampled)
            output.logprobs.append(entries if wants_logprobs else None)
            output.prompt_logprobs.append(self._scores(row.job, known[:end], row.start) if row.scores_prompt else None)
        return output

    @staticmethod
    def _scores(job: Sequence, known: list[int], start: int) -> list[TokenLogprobs]:
        return [
            logprob_of([*known[: position + 1], job.token_ids[position + 1]])
            for position in range(start, min(len(known), job.num_prompt - 1))
        ]

    def release(self, job_id: str) -> None:
        self._last.pop(job_id, None)

    def check(self) -> None:
        self.num_checks += 1
