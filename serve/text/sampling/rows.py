"""What a row asks, and its scores, as the sampler's kernels read them."""

# mypy: disable-error-code="no-untyped-def"
# (arguments of kernels are pointers and numbers of a compiler, not Python values)

from __future__ import annotations

import triton
import triton.language as tl

from serve.text.sampling.arithmetic import NO_TOKEN, score_of
from serve.text.sampling.words import MARGIN, NUM_WORDS, POSITION, SEED, TOP_K, TOP_P


@triton.jit
def word_of(params_ptr, slot, word: tl.constexpr):
    return tl.load(params_ptr + slot * NUM_WORDS + word)


@triton.jit
def number_of(params_ptr, slot, word: tl.constexpr):
    return tl.load(params_ptr + slot * NUM_WORDS + word).to(tl.float32, bitcast=True)


@triton.jit
def seed_of(params_ptr, slot):
    low = word_of(params_ptr, slot, SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (tl.load(params_ptr + slot * NUM_WORDS + SEED + 1).to(tl.uint32, bitcast=True).to(tl.uint64) << 32)


@triton.jit
def has_filter(params_ptr, slot):
    has_margin = number_of(params_ptr, slot, MARGIN) > float("-inf")
    return has_margin | (word_of(params_ptr, slot, TOP_K) > 0) | (number_of(params_ptr, slot, TOP_P) < 1.0)


@triton.jit
def wants_mass(params_ptr, slot, has_proposals: tl.constexpr):
    """Whether the mass of all tokens matters: not where min-p or top-k come before it."""
    is_cut = (number_of(params_ptr, slot, MARGIN) > float("-inf")) | (word_of(params_ptr, slot, TOP_K) > 0)
    wants = number_of(params_ptr, slot, TOP_P) < 1.0
    if has_proposals:
        wants = wants | (slot >= 0)
    return wants & (is_cut == 0)


@triton.jit
def position_of(draws_ptr, behind_ptr, num_draws, row):
    """Of the token to be drawn."""
    return tl.load(draws_ptr + POSITION * num_draws + row) - tl.load(behind_ptr + row).to(tl.int32)


@triton.jit
def best_of(best_ptr, row, num_blocks: tl.constexpr, blocks: tl.constexpr):
    lane = tl.arange(0, blocks)
    return score_of(tl.max(tl.load(best_ptr + row * num_blocks + lane, mask=lane < num_blocks, other=NO_TOKEN), 0))


@triton.jit
def tempered(x, best, temperature):
    """The largest score is taken off first, so that a tiny temperature cannot overflow."""
    return tl.where(temperature == 1.0, x, tl.div_rn(x - best, temperature))


@triton.jit
def tempered_scores(source, at, is_token):
    """Of tokens `at`: from what `shape` made of the logits, or the logits where it had nothing to do."""
    logits_ptr, scores_ptr, scores_row, best, temperature = source
    is_raw = at < tl.where(scores_row < 0, 0x7FFFFFFF, 0)  # Triton's interpreter takes no mask that is a scalar
    raw = tl.load(logits_ptr + at, mask=is_token & is_raw, other=float("-inf")).to(tl.float32)
    shaped = tl.load(scores_ptr + at, mask=is_token & ~is_raw, other=float("-inf"))
    return tempered(tl.where(scores_row >= 0, shaped, raw), best, temperature)
