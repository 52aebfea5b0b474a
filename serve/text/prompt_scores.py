"""Log-probabilities of prompt tokens: of each, given those before it, from the hidden states of a step.

Logits of a long chunk would be larger than its weights, so they are made and scored in slices.

Legend: T tokens of the step, D hidden size, R tokens of a slice, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch

from models.text.base import CausalLM
from serve.text.sampling.logprobs import Scores, score
from serve.text.sequence import Row
from serve.text.step_message import Step
from serve.transfer import to_device

_SCORED_AT_ONCE = 1 << 24
"""Logits held at once: 64 MiB of float32."""


@dataclass(slots=True)
class PromptScores:
    """Log-probabilities of one row's prompt tokens, in slices."""

    row: int
    num_top: int
    slices: list[tuple[Scores, torch.Tensor]]
    """With the largest logit of the whole slice, which tells whether all are numbers."""


def slices_of(row: Row, first: int, vocab_size: int) -> list[tuple[int, int]]:
    """Of the row's positions, which lie at `first` and on: those followed by a prompt token, in parts whose logits may
    be held at once."""
    num_known = min(row.start + 1 + len(row.token_ids), row.job.num_prompt) - row.start - 1
    size = max(1, _SCORED_AT_ONCE // vocab_size)
    stop = first + num_known
    return [(start, min(start + size, stop)) for start in range(first, stop, size)]


def score_prompts(rows: list[Row], step: Step, hidden_TD: torch.Tensor, model: CausalLM) -> list[PromptScores]:
    """The log-probability of each prompt token that follows one of the scored positions."""
    scores: dict[int, PromptScores] = {}
    ends = list(accumulate(step.layout.num_new))
    for start, stop in step.scored:
        at = bisect_right(ends, start)
        row = rows[at]
        num_top = row.job.prompt_logprobs
        assert num_top is not None
        skip = row.start + 1 - (ends[at - 1] if at else 0)
        next_ids = to_device(row.job.token_ids[start + skip : stop + skip], hidden_TD.device)
        logits_RV = model.logits(hidden_TD[start:stop])
        part = score(logits_RV, next_ids, num_top), logits_RV.amax()
        scores.setdefault(at, PromptScores(at, num_top, [])).slices.append(part)
    return list(scores.values())
