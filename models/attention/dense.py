"""Attention over keys and values that lie ready, under an explicit mask: what the gathering backends end in.

Legend: B batch, N query heads, T queries, K key/value heads, L keys, H head dimension.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def attend_dense(
    q_BNTH: torch.Tensor,
    k_BKLH: torch.Tensor,
    v_BKLH: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """out_BNTH. `mask` is added to the scores and broadcasts to [B, N, T, L]; heads are grouped when N > K.

    `softcap` squeezes scores into (-softcap, softcap) by tanh (Gemma 2). torch's kernels cannot, so it is written out,
    in float32 or better.
    """
    groups = q_BNTH.shape[1] // k_BKLH.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKLH, v_BKLH, attn_mask=mask, scale=scale, enable_gqa=groups > 1
        )
    keys, values = k_BKLH.repeat_interleave(groups, 1), v_BKLH.repeat_interleave(groups, 1)
    exact = torch.promote_types(q_BNTH.dtype, torch.float32)
    scores_BNTL = q_BNTH.to(exact) @ keys.to(exact).transpose(-1, -2) * scale
    weights_BNTL = torch.softmax((scores_BNTL / softcap).tanh() * softcap + mask, dim=-1)
    return (weights_BNTL @ values.to(exact)).to(q_BNTH.dtype)
