"""The sampler's kernels over blocks of the vocabulary (`launcher.py` says which run; `choose` is in
`threshold.py`). The operations on a score are `sampler.py`'s, one by one, in float32; the rules stand there.

Legend: R rows, V vocabulary, B blocks.
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
    token_of,
    uniform_of,
)
from serve.text.sampling.rows import (
    best_of,
    has_filter,
    number_of,
    position_of,
    seed_of,
    tempered,
    tempered_scores,
    wants_mass,
    word_of,
)
from serve.text.sampling.words import (
    COUNTS,
    END_FROM,
    ENTRIES,
    FREQUENCY,
    HISTORY,
    NUM_BIASES,
    NUM_ENDS,
    NUM_PROMPT,
    PRESENCE,
    REPETITION,
    SCORES,
    SLOT,
    TEMPERATURE,
)


@triton.jit(
    do_not_specialize=["num_draws", "num_penalised", "history_width"],
    do_not_specialize_on_alignment=["behind_ptr", "inputs_ptr"],
)
def note(draws_ptr, num_draws, behind_ptr, params_ptr, penalised_ptr, num_penalised, history_ptr, history_width,
         inputs_ptr, lanes: tl.constexpr):  # fmt: skip
    """Write the newest input of each penalised draw into its job's history, at the position where it truly lies."""
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    is_draw = lane < num_penalised
    row = tl.load(penalised_ptr + lane, mask=is_draw, other=0)
    position = position_of(draws_ptr, behind_ptr, num_draws, row)
    slot = tl.load(draws_ptr + SLOT * num_draws + row)
    at = word_of(params_ptr, slot, HISTORY).to(tl.int64) * history_width + position - 1
    tl.store(history_ptr + at, tl.load(inputs_ptr + row, mask=is_draw, other=0).to(tl.int32), mask=is_draw)


@triton.jit(do_not_specialize=["num_draws", "history_width"], do_not_specialize_on_alignment=["behind_ptr"])
def count(draws_ptr, num_draws, behind_ptr, params_ptr, penalised_ptr, history_ptr, history_width, counts_ptr,
          vocab: tl.constexpr, lanes: tl.constexpr):  # fmt: skip
    """Count the tokens before each penalised draw: how often among the output, and bit 30 for those of the prompt."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(penalised_ptr + index)
    position = position_of(draws_ptr, behind_ptr, num_draws, row)
    lane = tl.program_id(1) * lanes + tl.arange(0, lanes)
    is_seen = lane < position
    slot = tl.load(draws_ptr + SLOT * num_draws + row)
    history_row = word_of(params_ptr, slot, HISTORY).to(tl.int64)
    token = tl.load(history_ptr + history_row * history_width + lane, mask=is_seen, other=0)
    is_prompt = lane < word_of(params_ptr, slot, NUM_PROMPT)
    at = counts_ptr + index * vocab + token
    tl.atomic_or(at, 1 << 30, mask=is_seen & is_prompt, sem="relaxed")
    tl.atomic_add(at, 1, mask=is_seen & (lane >= word_of(params_ptr, slot, NUM_PROMPT)), sem="relaxed")


@triton.jit(
    do_not_specialize=["num_draws", "entries_width", "mask_stride"], do_not_specialize_on_alignment=["behind_ptr"]
)
def shape(logits_ptr, logits_stride, draws_ptr, num_draws, behind_ptr, params_ptr, scores_ptr, best_ptr,
          entries_ptr, entries_width, masks_ptr, mask_stride, mask_of_ptr, counts_ptr, maxima_ptr, mass_ptr, raw_ptr,
          vocab: tl.constexpr, block: tl.constexpr, group: tl.constexpr, has_proposals: tl.constexpr):  # fmt: skip
    """One block of one row: all that comes before the temperature."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    out = row * tl.num_programs(1) + part
    at = part * block + tl.arange(0, block)
    is_token = at < vocab
    x = tl.load(logits_ptr + row * logits_stride + at, mask=is_token, other=float("-inf")).to(tl.float32)
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    tl.store(raw_ptr + out, tl.where(has_nan, float("nan"), tl.max(tl.where(x != x, float("-inf"), x), 0)))
    slot = tl.load(draws_ptr + SLOT * num_draws + row)
    if slot >= 0:
        scores_row = tl.load(draws_ptr + SCORES * num_draws + row).to(tl.int64)
        if scores_row >= 0:
            num_biases = word_of(params_ptr, slot, NUM_BIASES)
            entries_at = entries_ptr + word_of(params_ptr, slot, ENTRIES).to(tl.int64) * entries_width
            x = _with_entries(x, at, part * block, entries_at, 0, num_biases, block)
            if position_of(draws_ptr, behind_ptr, num_draws, row) < word_of(params_ptr, slot, END_FROM):
                stop = num_biases + word_of(params_ptr, slot, NUM_ENDS)
                x = _with_entries(x, at, part * block, entries_at, num_biases, stop, block)
            mask_row = tl.load(mask_of_ptr + row).to(tl.int64)
            if mask_row >= 0:
                eight = tl.load(masks_ptr + mask_row * mask_stride + at // 8, mask=is_token, other=0).to(tl.int32)
                x = tl.where((eight >> (at % 8)) & 1 != 0, x, float("-inf"))
            counts_row = tl.load(draws_ptr + COUNTS * num_draws + row).to(tl.int64)
            if counts_row >= 0:
                counts = tl.load(counts_ptr + counts_row * vocab + at, mask=is_token, other=0)
                x = _penalised(x, counts, params_ptr, slot)
            tl.store(scores_ptr + scores_row * vocab + at, x, mask=is_token)
        temperature = number_of(params_ptr, slot, TEMPERATURE)
        if temperature != 0.0:
            maxima = tl.max(tl.reshape(x, [block // group, group]), 1)
            at_group = part * (block // group) + tl.arange(0, block // group)
            groups_stride = tl.num_programs(1) * (block // group)
            tl.store(maxima_ptr + row * groups_stride + at_group, maxima)
            if wants_mass(params_ptr, slot, has_proposals):
                y = tempered(x, tl.max(maxima, 0), temperature)
                tl.store(mass_ptr + out, tl.sum(mass(y - tl.max(y, 0)), 0))
    tl.store(best_ptr + out, tl.max(packed(ordered(x), at, is_token), 0))


@triton.jit(do_not_specialize=["num_draws", "stream"], do_not_specialize_on_alignment=["behind_ptr"])
def draw(logits_ptr, logits_stride, draws_ptr, num_draws, behind_ptr, params_ptr, scores_ptr, best_ptr, drawn_ptr,
         thresholds_ptr, log_mass_ptr, proposals_ptr, drafts_at_ptr, drafts_ptr, draft_mass_ptr, spare_ptr,
         hashed_ptr, stream, kept_ptr, vocab: tl.constexpr, block: tl.constexpr, num_blocks: tl.constexpr,
         blocks: tl.constexpr, has_proposals: tl.constexpr, keeps_scores: tl.constexpr):  # fmt: skip
    """One block of one row that is drawn and was not by `choose`.

    `spare_ptr`: where a draft is decided on, the draw should the residual be empty.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    out = row * num_blocks + part
    at = part * block + tl.arange(0, block)
    is_token = at < vocab
    slot = tl.load(draws_ptr + SLOT * num_draws + row)
    temperature = 0.0
    is_filtered = slot >= 0
    if slot >= 0:
        temperature = number_of(params_ptr, slot, TEMPERATURE)
        is_filtered = has_filter(params_ptr, slot) & (temperature != 0.0)
    proposal = -1
    if has_proposals:
        proposal = tl.load(proposals_ptr + row).to(tl.int32)
    is_drawn = (temperature != 0.0) & ((proposal >= 0) | (is_filtered == 0))
    if is_drawn | keeps_scores:
        scores_row = tl.load(draws_ptr + SCORES * num_draws + row).to(tl.int64)
        best = best_of(best_ptr, row, num_blocks, blocks)
        degree = tl.where(temperature == 0.0, 1.0, temperature)
        source = (logits_ptr + row * logits_stride, scores_ptr + scores_row * vocab, scores_row, best, degree)
        y = tempered_scores(source, at, is_token)
        threshold = LOWEST
        if is_filtered:
            threshold = tl.load(thresholds_ptr + row)
        y = tl.where(ordered(y) >= threshold, y, float("-inf"))
        if keeps_scores:
            tl.store(kept_ptr + row * vocab + at, y, mask=is_token)
        if is_drawn:
            position = position_of(draws_ptr, behind_ptr, num_draws, row)
            state = draw_state(seed_of(params_ptr, slot), position, tl.where(proposal >= 0, 3, stream))
            noise = log_standard_exponential(tl.load(hashed_ptr + at, mask=is_token, other=0), state)
            if proposal >= 0:
                y = (y - tempered(best, best, degree)) - tl.load(log_mass_ptr + row)
                tl.store(spare_ptr + out, tl.max(packed(ordered(y - noise), at, is_token), 0))
                drafts_at = tl.load(drafts_at_ptr + row).to(tl.int64)
                if drafts_at >= 0:
                    z = tl.load(drafts_ptr + drafts_at * vocab + at, mask=is_token, other=float("-inf"))
                    q = exponential((z - tl.load(draft_mass_ptr + 2 * row)) - tl.load(draft_mass_ptr + 2 * row + 1))
                    excess = exponential(y) - q
                    y = tl.where(excess > 0.0, logarithm(tl.maximum(excess, 1.1754943508222875e-38)), float("-inf"))
                y = tl.where(at == proposal, float("-inf"), y)
            tl.store(drawn_ptr + out, tl.max(packed(ordered(y - noise), at, is_token), 0))


@triton.jit
def weigh(drafts_ptr, drafts_at_ptr, draft_mass_ptr, vocab: tl.constexpr, block: tl.constexpr):
    """Of the scores a draft was drawn from: their largest, and the log of their mass relative to it."""
    row = tl.program_id(0).to(tl.int64)
    drafts_at = tl.load(drafts_at_ptr + row).to(tl.int64)
    if drafts_at >= 0:
        lane = tl.arange(0, block)
        largest = tl.full([block], float("-inf"), tl.float32)
        for start in range(0, vocab, block):
            at = start + lane
            z = tl.load(drafts_ptr + drafts_at * vocab + at, mask=at < vocab, other=float("-inf"))
            largest = tl.maximum(largest, z)
        best = tl.max(largest, 0)
        total = tl.zeros([block], tl.int64)
        for start in range(0, vocab, block):
            at = start + lane
            z = tl.load(drafts_ptr + drafts_at * vocab + at, mask=at < vocab, other=float("-inf"))
            total += mass(z - best)
        tl.store(draft_mass_ptr + 2 * row, best)
        share = (tl.sum(total, 0).to(tl.float64) * 9.094947017729282e-13).to(tl.float32)
        tl.store(draft_mass_ptr + 2 * row + 1, logarithm(share))


@triton.jit(do_not_specialize=["num_draws"], do_not_specialize_on_alignment=["behind_ptr"])
def finish(logits_ptr, logits_stride, draws_ptr, num_draws, behind_ptr, params_ptr, scores_ptr, best_ptr, drawn_ptr,
           thresholds_ptr, log_mass_ptr, proposals_ptr, drafts_at_ptr, drafts_ptr, draft_mass_ptr, spare_ptr,
           raw_ptr, token_ids_ptr, raw_best_ptr, vocab: tl.constexpr, num_blocks: tl.constexpr, blocks: tl.constexpr,
           has_proposals: tl.constexpr):  # fmt: skip
    """One row: its token, and the largest of its logits, NaN when one of them is."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, blocks)
    is_block = lane < num_blocks
    raw = tl.load(raw_ptr + row * num_blocks + lane, mask=is_block, other=float("-inf"))
    has_nan = tl.max((raw != raw).to(tl.int32), 0) > 0
    tl.store(raw_best_ptr + row, tl.where(has_nan, float("nan"), tl.max(tl.where(raw != raw, float("-inf"), raw), 0)))
    slot = tl.load(draws_ptr + SLOT * num_draws + row)
    is_drawn = slot >= 0
    if is_drawn:
        is_drawn = number_of(params_ptr, slot, TEMPERATURE) != 0.0
    packs_ptr = tl.where(is_drawn, drawn_ptr, best_ptr)
    pack = tl.max(tl.load(packs_ptr + row * num_blocks + lane, mask=is_block, other=NO_TOKEN), 0)
    token = tl.minimum(token_of(pack), vocab - 1)  # a row of NaN may have drawn nothing
    if has_proposals:
        proposal = tl.load(proposals_ptr + row)
        if is_drawn & (proposal >= 0):
            if score_of(pack) == float("-inf"):  # rounding rejected where the two distributions are equal
                spare = tl.load(spare_ptr + row * num_blocks + lane, mask=is_block, other=NO_TOKEN)
                token = tl.minimum(token_of(tl.max(spare, 0)), vocab - 1)
            best = best_of(best_ptr, row, num_blocks, blocks)
            temperature = number_of(params_ptr, slot, TEMPERATURE)
            scores_row = tl.load(draws_ptr + SCORES * num_draws + row).to(tl.int64)
            source = (
                logits_ptr + row * logits_stride, scores_ptr + scores_row * vocab, scores_row, best, temperature
            )  # fmt: skip
            y = tempered_scores(source, proposal, proposal < vocab)
            if has_filter(params_ptr, slot):
                y = tl.where(ordered(y) >= tl.load(thresholds_ptr + row), y, float("-inf"))
            log_p = (y - tempered(best, best, temperature)) - tl.load(log_mass_ptr + row)
            log_q = log_p * 0.0
            drafts_at = tl.load(drafts_at_ptr + row).to(tl.int64)
            if drafts_at >= 0:
                z = tl.load(drafts_ptr + drafts_at * vocab + proposal)
                log_q = (z - tl.load(draft_mass_ptr + 2 * row)) - tl.load(draft_mass_ptr + 2 * row + 1)
            position = position_of(draws_ptr, behind_ptr, num_draws, row)
            chance = uniform_of(draw_state(seed_of(params_ptr, slot), position, 2))
            token = tl.where(logarithm(chance) + log_q < log_p, proposal, token)
    tl.store(token_ids_ptr + row, token)


@triton.jit
def _with_entries(x, at, begin, entries_ptr, first, stop, block: tl.constexpr):
    """Add entries [first, stop), pairs of token and value in order, to the scores of a block from token `begin` on."""
    lane = tl.arange(0, 128)
    low = first
    high = first
    for start in range(first, stop, 128):
        ids = tl.load(entries_ptr + 2 * (start + lane), mask=start + lane < stop, other=2147483647)
        low += tl.sum((ids < begin).to(tl.int32), 0)
        high += tl.sum((ids < begin + block).to(tl.int32), 0)
    for entry in range(low, high):
        value = tl.load(entries_ptr + 2 * entry + 1).to(tl.float32, bitcast=True)
        x = tl.where(at == tl.load(entries_ptr + 2 * entry), x + value, x)
    return x


@triton.jit
def _penalised(x, counts, params_ptr, slot):
    repetition = number_of(params_ptr, slot, REPETITION)
    x = tl.where(counts != 0, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
    times = (counts & 0x3FFFFFFF).to(tl.float32)
    presence = tl.where(times > 0.0, number_of(params_ptr, slot, PRESENCE), 0.0)
    return x - (times * number_of(params_ptr, slot, FREQUENCY) + presence)
