"""A fake device for tokens: no model, but a memory. What it samples is a hash of the tokens it finds in the blocks.

A scheduler that shares, frees or reuses a block wrongly makes it read other tokens than the sequence's own, and the
outputs differ from `tokens_alone`. Batches are computed when they are collected, as late as a real device may; blocks
that are free by then hold poison, and to write one is a breach. Drafts are what it is going to sample, spoilt here and
there, so that any number of them is accepted. When it `runs_ahead` it makes them as late as everything else, from what
it finds in its memory: where a sequence goes on behind them the host learns afterwards.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from zlib import crc32

import numpy as np
from beams import Found, group_oracle, plain_oracle

from serve.engine.interface import DeviceFault
from serve.events import TokenLogprobs
from serve.request import BeamParams, SamplingParams
from serve.text.beams.group import BeamGroup
from serve.text.kv_cache import KVCache
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import PENDING, Row, Sequence, TokenBatch, TokenOutput
from serve.text.speculation.verification import until_rejected

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


def guess(token_ids: list[int], seed: int, num_drafts: int) -> list[int]:
    """Drafts: what follows `token_ids`, but for a fifth of the places, which are wrong."""
    known = list(token_ids)
    for _ in range(num_drafts):
        is_wrong = crc32(array("i", known).tobytes(), 1) % 5 == 0
        known.append((next_token(known, seed) + is_wrong) % VOCAB)
    return known[len(token_ids) :]


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


@dataclass
class Submitted:
    """A batch in flight, with the block tables as they were."""

    batch: TokenBatch
    tables: list[list[int]]


class TokenDevice:
    """A `Runner`. `fails(batch)` decides whether computing a batch raises. `is_staged`: it has several stages, which
    know no token of a batch that has not left the last one. `runs_ahead`: drafts stay on it. `kv_cache`: whose blocks
    it writes, to see which are free."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        fails: Callable[[TokenBatch], bool] = lambda batch: False,
        *,
        is_staged: bool = False,
        runs_ahead: bool = False,
        kv_cache: KVCache | None = None,
    ):
        self.block_size = block_size
        self.batches: list[TokenBatch] = []
        self.num_checks = 0
        self.num_behind_drafts = 0
        """Rows that began while it was in doubt where, and those of them with drafts of their own."""
        self.num_drafts_behind_drafts = 0
        self._fails = fails
        self._is_staged = is_staged
        self._runs_ahead = runs_ahead
        self._kv_cache = kv_cache
        self._memory: list[int | None] = [None] * (num_blocks * block_size)
        self._newest: dict[str, tuple[int, int]] = {}
        """Of each job: the token sampled last and its position."""
        self._unsettled: list[Submitted] = []

    def submit(self, batch: TokenBatch) -> Submitted:
        before = {row.job.id: row for row in self.batches[-1].rows} if self.batches else {}
        self.batches.append(batch)
        require(bool(batch.rows), "an empty batch")
        tables = []
        for row in batch.rows:
            end = row.start + len(row.token_ids) + row.num_drafts
            require(bool(row.token_ids), "a row without tokens")
            require(PENDING not in row.token_ids[:-1], "a pending token that is not the last")
            earlier = before.get(row.job.id)
            if row.token_ids[-1] == PENDING:
                require(not self._is_staged, "a pending token between stages")
                require(earlier is not None and earlier.samples, "a token that the step before did not sample")
            num_missing = row.start + len(row.token_ids) - len(row.job.token_ids)
            require(num_missing < 2 or not row.job.sampling.needs_history, "a history with a gap")
            require(not row.num_in_doubt or self._runs_ahead, "a row behind drafts")
            tables.append(list(row.block_table[: -(-end // self.block_size)]))
            require(len(tables[-1]) * self.block_size >= end, "a row without room")
            if row.num_drafts:
                is_known = row.token_ids == row.job.token_ids[row.start :]
                can_follow = row.job.may_run_ahead and (
                    num_missing == 1 or (earlier is not None and bool(earlier.drafts))
                )
                require(row.samples and (is_known or can_follow), "drafts behind unknown tokens")
                self._propose(row)
            self.num_behind_drafts += row.num_in_doubt > 0
            self.num_drafts_behind_drafts += row.num_in_doubt > 0 and bool(row.drafts)
        self._unsettled.append(Submitted(batch, tables))
        return self._unsettled[-1]

    def _propose(self, row: Row) -> None:
        """Fewer drafts than asked for where a proposer would know nothing."""
        known = array("i", [*row.job.token_ids, row.start]).tobytes()
        num_drafts = min(crc32(known, 2) % (2 * row.num_drafts), row.num_drafts)
        if self._runs_ahead and row.job.may_run_ahead:
            row.drafts = [PENDING] * num_drafts
        else:
            row.drafts = guess(row.job.token_ids, row.job.sampling.seed, num_drafts)

    def collect(self, handle: Submitted) -> TokenOutput:
        require(self._unsettled.pop(0) is handle, "collected out of order")
        batch = handle.batch
        self._poison()
        for source, target in batch.copies:
            for i in range(self.block_size):
                self._memory[target * self.block_size + i] = self._memory[source * self.block_size + i]
        starts = [self._write(row, table) for row, table in zip(batch.rows, handle.tables)]
        output = TokenOutput([], [], [])
        for i, (row, table, start) in enumerate(zip(batch.rows, handle.tables, starts)):
            end = start + len(row.token_ids)
            known = self._read(table, end + len(row.drafts))
            sampled: tuple[int, ...] = ()
            if row.samples and row.num_candidates:
                output.candidates[i] = candidates(known, row.job, row.num_candidates)
            elif row.samples:
                require(row.sample_position - row.start == end - start, "a wrong position of the random stream")
                seed = row.job.sampling.seed
                drawn = [next_token(known[: end + i], seed) for i in range(len(row.drafts) + 1)]
                sampled = until_rejected(drawn, row.drafts)
                self._newest[row.job.id] = sampled[-1], end + len(sampled) - 1
            wants_logprobs = sampled and row.job.sampling.logprobs is not None
            full = [*known[:end], *sampled]
            entries = tuple(logprob_of(full[: i + 1]) for i in range(end, len(full)))
            output.token_ids.append(sampled)
            output.logprobs.append(entries if wants_logprobs else None)
            output.prompt_logprobs.append(self._scores(row.job, known[:end], row.start) if row.scores_prompt else None)
        if self._fails(batch):
            raise RuntimeError("this batch fails")
        return output

    def _write(self, row: Row, table: list[int]) -> int:
        """Fill the row's positions, drafts included; where they really begin."""
        token_ids, start = list(row.token_ids), row.start
        if token_ids[-1] == PENDING:
            token_ids[-1], position = self._newest[row.job.id]
            start = position + 1 - len(token_ids)
        require(0 <= row.start - start <= row.num_in_doubt, "a row that is not where it was said to be")
        for position, token_id in enumerate(token_ids, start):
            self._set(row, table, position, token_id)
        if PENDING in row.drafts:
            known = self._read(table, start + len(token_ids))
            row.drafts = guess(known, row.job.sampling.seed, len(row.drafts))
        for position, token_id in enumerate(row.drafts, start + len(token_ids)):
            self._set(row, table, position, token_id)
        return start

    def _set(self, row: Row, table: list[int], position: int, token_id: int) -> None:
        block = table[position // self.block_size]
        if self._kv_cache is not None:
            require(self._kv_cache.num_references(block) > 0, "a step in flight writes a block that is free")
        for later in self._unsettled:
            for other, other_table in zip(later.batch.rows, later.tables):
                is_safe = other.job.owner is row.job.owner or block not in other_table
                require(is_safe, "a step in flight writes a block that a later one gave to another job")
        self._memory[block * self.block_size + position % self.block_size] = token_id

    def _read(self, table: list[int], end: int) -> list[int]:
        size = self.block_size
        seen = [self._memory[table[position // size] * size + position % size] for position in range(end)]
        return [-2 if token_id is None else token_id for token_id in seen]

    def _poison(self) -> None:
        """Nobody reads what is in free blocks, but for those that are found by their prefix."""
        cache = self._kv_cache
        for block in () if cache is None else range(cache.num_blocks):
            if not cache.num_references(block) and cache._hashes[block] is None:
                self._memory[block * self.block_size : (block + 1) * self.block_size] = [None] * self.block_size

    @staticmethod
    def _scores(job: Sequence, known: list[int], start: int) -> list[TokenLogprobs]:
        return [
            logprob_of([*known[: position + 1], job.token_ids[position + 1]])
            for position in range(start, min(len(known), job.num_prompt - 1))
        ]

    def release(self, job_id: str) -> None:
        self._newest.pop(job_id, None)

    def check(self) -> None:
        self.num_checks += 1
