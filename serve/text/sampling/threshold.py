"""The threshold of min-p, top-k and top-p of one row, without a sort, and the draw from what is left.

A group's maximum tells whether any of its 32 tokens can be above a threshold: the k-th largest maximum is at most the
k-th largest score, and a nucleus ends above the score at which the maxima alone hold its mass. The scores of the few
groups left are bisected, as keys that order as integers, from one score that is there to the next: exact,
and in about as many steps as their number has bits. Masses are integers, so that no sum depends on an order.

Radix selection as in the top-k of Alabi et al. (2012), bisection for nuclei as in FlashInfer (Ye et al., 2025).
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

import triton
import triton.language as tl

from serve.text.sampling.arithmetic import (
    LOWEST,
    NO_TOKEN,
    draw_state,
    exponential,
    log_standard_exponential,
    logarithm,
    mass,
    ordered,
    packed,
    score_of,
)
from serve.text.sampling.rows import has_filter, number_of, position_of, seed_of, tempered, tempered_scores, word_of
from serve.text.sampling.words import MARGIN, SCORES, SLOT, TEMPERATURE, TOP_K, TOP_P


@triton.jit(do_not_specialize=["num_draws", "stream"], do_not_specialize_on_alignment=["behind_ptr"])
def choose(logits_ptr, logits_stride, draws_ptr, num_draws, behind_ptr, params_ptr, scores_ptr, best_ptr, drawn_ptr,
           thresholds_ptr, log_mass_ptr, proposals_ptr, maxima_ptr, mass_ptr, list_ptr, hashed_ptr, stream,
           vocab: tl.constexpr, num_blocks: tl.constexpr, blocks: tl.constexpr, num_groups: tl.constexpr,
           groups: tl.constexpr, group: tl.constexpr, listed: tl.constexpr, has_proposals: tl.constexpr):  # fmt: skip
    """One row: its threshold and, unless a draft is to be decided on, its draw, as the best of the first block."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(draws_ptr + SLOT * num_draws + row)
    proposal = -1
    if has_proposals:
        proposal = tl.load(proposals_ptr + row).to(tl.int32)
    is_drawn = slot >= 0
    if is_drawn:
        is_drawn = (number_of(params_ptr, slot, TEMPERATURE) != 0.0) & ((proposal >= 0) | has_filter(params_ptr, slot))
    if is_drawn:
        temperature = number_of(params_ptr, slot, TEMPERATURE)
        scores_row = tl.load(draws_ptr + SCORES * num_draws + row).to(tl.int64)
        part = tl.arange(0, blocks)
        packs = tl.load(best_ptr + row * num_blocks + part, mask=part < num_blocks, other=NO_TOKEN)
        best = score_of(tl.max(packs, 0))
        source = (logits_ptr + row * logits_stride, scores_ptr + scores_row * vocab, scores_row, best, temperature)
        best_y = tempered(best, best, temperature)
        total = _total_mass(packs, mass_ptr + row * num_blocks + part, part < num_blocks, best_y, source)

        lane = tl.arange(0, groups)
        is_group = lane < num_groups
        maxima = tl.load(maxima_ptr + row * num_groups + lane, mask=is_group, other=float("-inf"))
        maxima_y = tempered(maxima, best, temperature)
        keys = tl.where(is_group, ordered(maxima_y), LOWEST)
        low, most = _bounds(keys, maxima_y, best_y, total, params_ptr, slot, num_groups)
        is_listed = is_group & (keys >= most)
        num_listed = tl.sum(is_listed.to(tl.int32), 0)
        list_at = list_ptr + row * num_groups
        tl.store(list_at + tl.cumsum(is_listed.to(tl.int32), 0) - 1, lane, mask=is_listed)
        tl.debug_barrier()

        top = ordered(best_y).to(tl.int64)
        top_k = word_of(params_ptr, slot, TOP_K)
        top_p = number_of(params_ptr, slot, TOP_P)
        threshold = tl.maximum(low, most).to(tl.int64)
        if top_k > 0:
            threshold = _kth(threshold, top, top_k, source, list_at, num_listed, vocab, listed, group)
        if (top_k > 0) | (low > LOWEST):
            total = _mass_from(threshold, best_y, source, list_at, num_listed, vocab, listed, group).to(tl.float64)
        if top_p < 1.0:
            target = top_p.to(tl.float64) * total
            threshold = _nucleus(threshold, top, target, best_y, source, list_at, num_listed, vocab, listed, group)
        tl.store(thresholds_ptr + row, threshold.to(tl.int32))
        if proposal >= 0:
            if top_p < 1.0:
                total = _mass_from(threshold, best_y, source, list_at, num_listed, vocab, listed, group).to(tl.float64)
            tl.store(log_mass_ptr + row, logarithm((total * 9.094947017729282e-13).to(tl.float32)))
        else:
            position = position_of(draws_ptr, behind_ptr, num_draws, row)
            state = draw_state(seed_of(params_ptr, slot), position, stream)
            drawn = _drawn(threshold, state, hashed_ptr, source, list_at, num_listed, vocab, listed, group)
            tl.store(drawn_ptr + row * num_blocks + part, tl.where(part == 0, drawn, NO_TOKEN), mask=part < num_blocks)


@triton.jit
def _listed(start, source, list_at, num_listed, vocab: tl.constexpr, listed: tl.constexpr, group: tl.constexpr):
    """The tokens of `listed` groups of the list, their scores, and these as keys."""
    lane = start + tl.arange(0, listed)
    is_there = lane < num_listed
    which = tl.load(list_at + lane, mask=is_there, other=0)
    at = which[:, None] * group + tl.arange(0, group)[None, :]
    is_token = is_there[:, None] & (at < vocab)
    y = tempered_scores(source, at, is_token)
    return at, is_token, y, tl.where(is_token, ordered(y), LOWEST)


@triton.jit
def _bounds(keys, maxima_y, best_y, total, params_ptr, slot, num_groups: tl.constexpr):
    """Keys below which nothing is kept: by min-p, exactly, and what the groups' maxima tell of top-k or top-p."""
    margin = number_of(params_ptr, slot, MARGIN)
    top_k = word_of(params_ptr, slot, TOP_K)
    top_p = number_of(params_ptr, slot, TOP_P)
    least = LOWEST
    if margin > float("-inf"):
        least = ordered(best_y + margin)
    most = least
    if top_k > 0:
        if top_k <= num_groups:
            most = tl.maximum(least, _kth_maximum(keys, top_k))
    elif (top_p < 1.0) & (margin == float("-inf")):
        most = _nucleus_of_maxima(keys, mass(maxima_y - best_y), top_p.to(tl.float64) * total)
    return least, most


@triton.jit
def _total_mass(packs, mass_at, is_block, best_y, source):
    """Of the whole row relative to `best_y`, from the masses of its blocks relative to their own best."""
    best = source[3]
    temperature = source[4]
    block_y = tempered(score_of(packs), best, temperature)
    weight = tl.where(is_block, exponential(block_y - best_y), 0.0).to(tl.float64)
    return tl.sum(weight * tl.load(mass_at, mask=is_block, other=0).to(tl.float64), 0)


@triton.jit
def _kth_maximum(keys, k):
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64)
    while low < high:
        pivot = (low + ((high - low + 1) >> 1)).to(tl.int32)
        is_above = keys >= pivot
        if tl.sum(is_above.to(tl.int32), 0) >= k:
            low = tl.min(tl.where(is_above, keys, 0x7FFFFFFF), 0).to(tl.int64)
        else:
            high = tl.maximum(low, tl.max(tl.where(is_above, LOWEST, keys), 0).to(tl.int64))
    return low.to(tl.int32)


@triton.jit
def _nucleus_of_maxima(keys, weights, target):
    """The smallest maximum above which maxima hold less than `target`: a nucleus of that mass ends there or above.

    LOWEST when all of them together hold less: they tell nothing then.
    """
    high = tl.max(keys, 0).to(tl.int64)
    low = high * 0 + LOWEST
    while low < high:
        pivot = (low + ((high - low) >> 1)).to(tl.int32)
        is_above = keys > pivot
        if tl.sum(tl.where(is_above, weights, 0), 0).to(tl.float64) < target:
            high = tl.maximum(low, tl.max(tl.where(is_above, LOWEST, keys), 0).to(tl.int64))
        else:
            low = tl.min(tl.where(is_above, keys, 0x7FFFFFFF), 0).to(tl.int64)
    return low.to(tl.int32)


@triton.jit
def _kth(low, high, k, source, list_at, num_listed, vocab: tl.constexpr, listed: tl.constexpr, group: tl.constexpr):
    """The k-th largest score, as a key, or `low` where that is larger; all scores above `low` are in the list."""
    while low < high:
        pivot = (low + ((high - low + 1) >> 1)).to(tl.int32)
        num = tl.zeros([listed, group], tl.int32)
        above = tl.full([listed, group], 0x7FFFFFFF, tl.int32)
        below = tl.full([listed, group], LOWEST, tl.int32)
        for start in range(0, num_listed, listed):
            _at, _is_token, _y, keys = _listed(start, source, list_at, num_listed, vocab, listed, group)
            is_above = keys >= pivot
            num += is_above.to(tl.int32)
            above = tl.minimum(above, tl.where(is_above, keys, 0x7FFFFFFF))
            below = tl.maximum(below, tl.where(is_above, LOWEST, keys))
        if tl.sum(num) >= k:
            low = tl.min(above).to(tl.int64)
        else:
            high = tl.maximum(low, tl.max(below).to(tl.int64))
    return low


@triton.jit
def _nucleus(low, high, target, best_y, source, list_at, num_listed,
             vocab: tl.constexpr, listed: tl.constexpr, group: tl.constexpr):  # fmt: skip
    """The smallest score in [low, high], as a key, above which scores hold less than `target`."""
    while low < high:
        pivot = (low + ((high - low) >> 1)).to(tl.int32)
        held = tl.zeros([listed, group], tl.int64)
        above = tl.full([listed, group], 0x7FFFFFFF, tl.int32)
        below = tl.full([listed, group], LOWEST, tl.int32)
        for start in range(0, num_listed, listed):
            _at, _is_token, y, keys = _listed(start, source, list_at, num_listed, vocab, listed, group)
            is_above = keys > pivot
            held += tl.where(is_above, mass(y - best_y), 0)
            above = tl.minimum(above, tl.where(is_above, keys, 0x7FFFFFFF))
            below = tl.maximum(below, tl.where(is_above, LOWEST, keys))
        if tl.sum(held).to(tl.float64) < target:
            high = tl.maximum(low, tl.max(below).to(tl.int64))
        else:
            low = tl.min(above).to(tl.int64)
    return low


@triton.jit
def _mass_from(threshold, best_y, source, list_at, num_listed,
               vocab: tl.constexpr, listed: tl.constexpr, group: tl.constexpr):  # fmt: skip
    held = tl.zeros([listed, group], tl.int64)
    for start in range(0, num_listed, listed):
        _at, _is_token, y, keys = _listed(start, source, list_at, num_listed, vocab, listed, group)
        held += tl.where(keys >= threshold, mass(y - best_y), 0)
    return tl.sum(held)


@triton.jit
def _drawn(threshold, state, hashed_ptr, source, list_at, num_listed,
           vocab: tl.constexpr, listed: tl.constexpr, group: tl.constexpr):  # fmt: skip
    """The best of the scores from `threshold` on, each with its noise."""
    best = tl.full([listed, group], NO_TOKEN, tl.int64)
    for start in range(0, num_listed, listed):
        at, is_token, y, keys = _listed(start, source, list_at, num_listed, vocab, listed, group)
        noise = log_standard_exponential(tl.load(hashed_ptr + at, mask=is_token, other=0), state)
        is_kept = keys >= threshold
        best = tl.maximum(best, packed(ordered(tl.where(is_kept, y - noise, float("-inf"))), at, is_token))
    return tl.max(best)
