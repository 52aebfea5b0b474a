"""What the sampler's kernels know of jobs: tables on the device with a row for each that is more than plain.

`params` says what a request asks, `entries` its biases and end tokens, `histories` the tokens that penalties count. A
history begins as the tokens known when the job is first seen; from then on each draw's newest input is written where it
truly lies (`kernels.note`). Every token of an output is such an input once before it counts, drafts included;
what rejected drafts left behind is overwritten before a draw looks so far, and a preempted sequence has the same tokens
at the same positions. So the host sends none, and need not know them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from models.staging import Staging
from serve.text.sampling import words as word
from serve.text.sampling.gumbel import seed_state
from serve.text.sampling.sampler import Recipe
from serve.text.sequence import Sequence
from serve.text.slot_table import SlotTable


@dataclass(slots=True)
class KnownJob:
    """A job's rows in the tables."""

    recipe: Recipe
    slot: int
    """Its row of parameters."""
    is_greedy: bool
    is_filtered: bool
    changes_scores: bool
    """In every step: by biases, a grammar or penalties. End tokens are masked in some."""
    entries: int | None
    history: int | None
    contents: list[tuple[SlotTable, int, np.ndarray]]
    """What its rows are to hold; empty once that is written."""


@dataclass(slots=True)
class Writes:
    """Contents of a job's rows, on the device once the step's staging buffer is sent."""

    known: KnownJob
    staged: list[tuple[SlotTable, int, torch.Tensor]]

    def apply(self) -> None:
        for table, row, values in self.staged:
            table.words_SW[row, : len(values)] = values
        self.known.contents = []


class SamplerJobs:
    """The tables of one sampler. They grow with the jobs that are neither plain nor over."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.params = SlotTable(word.NUM_WORDS.value, device)
        self.entries = SlotTable(32, device)
        self.histories = SlotTable(64, device)
        self._vocab_size = vocab_size
        self._known: dict[str, KnownJob] = {}

    def find(self, job: Sequence, recipe: Recipe) -> KnownJob:
        known = self._known.get(job.id)
        if known is None or known.recipe is not recipe:
            self.forget(job.id)
            known = self._known[job.id] = self._learn(job, recipe)
        return known

    def stage(self, known: KnownJob, staging: Staging) -> Writes:
        return Writes(known, [(table, row, staging.put(values, torch.int32)) for table, row, values in known.contents])

    def forget(self, job_id: str) -> None:
        known = self._known.pop(job_id, None)
        if known is None:
            return
        self.params.give_back(known.slot)
        if known.entries is not None:
            self.entries.give_back(known.entries)
        if known.history is not None:
            self.histories.give_back(known.history)

    def _learn(self, job: Sequence, recipe: Recipe) -> KnownJob:
        words = self._words(job, recipe)
        numbers = words.view(np.float32)
        is_greedy = numbers[word.TEMPERATURE] == 0.0
        is_filtered = numbers[word.MARGIN] > -math.inf or words[word.TOP_K] > 0 or numbers[word.TOP_P] < 1.0
        known = KnownJob(
            recipe,
            self.params.take(len(words)),
            bool(is_greedy),
            bool(is_filtered and not is_greedy),
            bool(recipe.params.logit_bias or recipe.params.needs_history or job.matcher is not None),
            None,
            None,
            [],
        )
        pairs = _entries(job, recipe)
        words[word.NUM_BIASES] = len(recipe.params.logit_bias)
        words[word.NUM_ENDS] = len(pairs) - len(recipe.params.logit_bias)
        if len(pairs):
            known.entries = words[word.ENTRIES] = self.entries.take(pairs.size)
            known.contents.append((self.entries, known.entries, pairs.reshape(-1)))
        if recipe.params.needs_history:
            width = max(job.num_prompt + recipe.params.max_tokens, len(job.token_ids))
            known.history = words[word.HISTORY] = self.histories.take(width)
            known.contents.append((self.histories, known.history, np.array(job.token_ids, np.int32)))
        known.contents.append((self.params, known.slot, words))
        return known

    def _words(self, job: Sequence, recipe: Recipe) -> np.ndarray:
        params = recipe.params
        words = np.zeros(word.NUM_WORDS.value, np.int32)
        numbers = words.view(np.float32)
        words[word.SEED], words[word.SEED + 1] = seed_state(params.seed)
        numbers[word.TEMPERATURE] = params.temperature
        numbers[word.MARGIN] = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        words[word.TOP_K] = params.top_k if params.top_k < self._vocab_size else 0
        numbers[word.TOP_P] = params.top_p
        numbers[word.REPETITION] = params.repetition_penalty
        numbers[word.PRESENCE] = params.presence_penalty
        numbers[word.FREQUENCY] = params.frequency_penalty
        words[word.NUM_PROMPT] = job.num_prompt
        words[word.END_FROM] = job.num_prompt + params.min_tokens
        return words


def _entries(job: Sequence, recipe: Recipe) -> np.ndarray:
    """Pairs of token and value: the job's biases, then -inf for each end token that may come too early."""
    biases = sorted(recipe.params.logit_bias, key=lambda entry: entry[0])  # stable: a token's own stay in their order
    wants_ends = recipe.params.min_tokens > 0 and job.matcher is None
    ends = [(token_id, -math.inf) for token_id in sorted(set(recipe.end_ids))] if wants_ends else []
    pairs = np.empty((len(biases) + len(ends), 2), np.int32)
    for i, (token_id, value) in enumerate(biases + ends):
        pairs[i] = token_id, np.float32(value).view(np.int32)
    return pairs
