"""Verifies draft tokens: what the target model draws in their places decides how many hold.

A step gives logits after every draft, as if those before it were right. From each a token is drawn, and a draft holds
when the token drawn in its place is the draft itself. So a row's output is its draws up to the first that differs: the
accepted drafts, and one token more. There are two ways to draw, and each leaves the distribution of the output as it is
without drafts:

- `coupled`: the token that plain sampling would draw, with plain sampling's noise of that position. The output is not
  only distributed as without speculation, it is the same: it depends neither on the drafts nor on how many there are,
  and that number follows the load. A draft model that draws with the same noise from its own distribution often draws
  the same token (at least with probability (1 - d) / (1 + d) where d is the total variation distance of the two; Daliri
  et al., "Coupling without communication and drafter-invariant speculative decoding", 2024). For a draft without
  alternatives (greedy, n-gram) it holds with probability p(draft), exactly as with rejection sampling.
- `standard`: rejection sampling (Leviathan et al., 2023; Chen et al., 2023). The draft, drawn from q, holds with
  probability min(1, p / q); otherwise the token is drawn from the normalised max(p - q, 0). A draft holds with
  probability 1 - d, the most that is possible. Draft, decision and replacement have independent noise, so the tokens of
  a request depend on how many drafts each of its steps had.

`coupled` is the default, for the same request and seed shall give the same tokens under any load.

Legend: R draws of drafted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def until_rejected(drawn: Sequence[int], drafts: Sequence[int]) -> tuple[int, ...]:
    """The draws that stand: one more than the drafts that hold. `drawn` has one more token than `drafts`."""
    num_accepted = 0
    while num_accepted < len(drafts) and drawn[num_accepted] == drafts[num_accepted]:
        num_accepted += 1
    return tuple(drawn[: num_accepted + 1])


def reject_(
    scores_RV: torch.Tensor, drafts_R: torch.Tensor, draft_scores_RV: torch.Tensor | None, uniforms_R: torch.Tensor
) -> None:
    """Turn processed scores into those of the decision: only the draft where it holds, else log max(p - q, 0).

    A draw from them is then `standard`'s. `draft_scores_RV`: the scores the drafts were drawn from; None when there was
    no choice (q is 1 at the draft). The residual is 0 at a rejected draft, which so cannot be drawn again.
    """
    target_RV = scores_RV.log_softmax(-1)
    at_R1 = drafts_R[:, None]
    target_R1 = target_RV.gather(1, at_R1)
    if draft_scores_RV is None:
        log_q_R1 = torch.zeros_like(target_R1)
        residual_RV = target_RV.scatter(1, at_R1, -torch.inf)
    else:
        log_q_RV = draft_scores_RV.log_softmax(-1)
        log_q_R1 = log_q_RV.gather(1, at_R1)
        excess_RV = (target_RV.exp() - log_q_RV.exp()).clamp_(min=0.0)
        residual_RV = excess_RV.scatter_(1, at_R1, 0.0).log_()
    # Rounding can reject where p equals q and nothing is left over; then p itself is as good.
    is_empty_R1 = (residual_RV == -torch.inf).all(-1, keepdim=True)
    residual_RV = torch.where(is_empty_R1, target_RV, residual_RV)
    holds_R1 = uniforms_R[:, None].log() + log_q_R1 < target_R1
    only_RV = torch.full_like(scores_RV, -torch.inf).scatter_(1, at_R1, 0.0)
    scores_RV.copy_(torch.where(holds_R1, only_RV, residual_RV))
