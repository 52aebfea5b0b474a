"""What may follow a beam: its likeliest next tokens with their log-probabilities, for the search to choose from.

As in transformers' beam search the logits become log-probabilities first; then bias, minimum length, grammar and
penalties change them, and they are not normalised again.

Legend: R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serve.text.sampling.sampler import TokenSampler, require_finite
from serve.text.sequence import Row


@dataclass(slots=True)
class Candidates:
    """Of all beams of one step, best first; on the device until `to_host`."""

    rows: Sequence[Row]
    token_ids_RK: torch.Tensor
    logprobs_RK: torch.Tensor
    best_R: torch.Tensor
    """The largest raw logit of each row."""

    def to_host(self, download: Callable[[torch.Tensor], torch.Tensor]) -> Candidates:
        return Candidates(self.rows, download(self.token_ids_RK), download(self.logprobs_RK), download(self.best_R))

    def tolist(self) -> list[list[tuple[int, float]]]:
        """One list a row, without what is impossible. From host tensors; `RequestFailed` for rows of NaN."""
        require_finite(self.best_R.tolist(), self.rows)
        return [
            [entry for entry in zip(token_ids[: row.num_candidates], logprobs) if entry[1] > -math.inf]
            for row, token_ids, logprobs in zip(self.rows, self.token_ids_RK.tolist(), self.logprobs_RK.tolist())
        ]


def find_candidates(sampler: TokenSampler, logits_RV: torch.Tensor, rows: Sequence[Row]) -> Candidates:
    """`logits_RV` is float32 and stays as it is."""
    scores_RV = sampler.penalised(logits_RV.log_softmax(-1), rows)
    num = min(max(row.num_candidates for row in rows), logits_RV.shape[1])
    best = scores_RV.topk(num, dim=-1)
    return Candidates(rows, best.indices, best.values, logits_RV.amax(-1))
