"""Log-probabilities of chosen tokens and their best alternatives, from the model's raw logits.

Legend: R rows, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from serve.events import TokenLogprobs


@dataclass(slots=True)
class Scores:
    """One row per position, on the device until `tolist`."""

    token_ids_R: torch.Tensor
    logprobs_R: torch.Tensor
    ranks_R: torch.Tensor
    top_ids_RK: torch.Tensor
    top_logprobs_RK: torch.Tensor

    def to_host(self, download: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        return Scores(
            download(self.token_ids_R),
            download(self.logprobs_R),
            download(self.ranks_R),
            download(self.top_ids_RK),
            download(self.top_logprobs_RK),
        )

    def tolist(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """One entry per row, with the first `num_top[i]` alternatives of row i. From host tensors."""
        return [
            TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:n], logprobs[:n])))
            for token_id, logprob, rank, ids, logprobs, n in zip(
                self.token_ids_R.tolist(),
                self.logprobs_R.tolist(),
                self.ranks_R.tolist(),
                self.top_ids_RK.tolist(),
                self.top_logprobs_RK.tolist(),
                num_top,
            )
        ]


def score(logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top: int) -> Scores:
    """Log-probability and rank of each row's token, and the `num_top` most likely tokens."""
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen_R1 = logprobs_RV.gather(1, token_ids_R[:, None])
    ranks_R = (logprobs_RV > chosen_R1).count_nonzero(-1) + 1
    top = logprobs_RV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
    return Scores(token_ids_R, chosen_R1[:, 0], ranks_R, top.indices, top.values)
