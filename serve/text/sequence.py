"""A sequence: one generation over tokens, and the batch in which it travels to the runner.

    | num_cached (prefix hit) | computed earlier | scheduled, in flight | not yet scheduled |
    0                                            ^ num_computed         ^ num_scheduled     ^ len(token_ids)

`num_scheduled` runs ahead of `num_computed` while steps are in flight. A token that a step in flight will sample is not
in `token_ids` yet: the scheduler counts it as `num_pending`, the runner knows its value on the device.

Speculation: a row may ask for draft tokens after its newest one. The runner proposes them, computes them in the same
forward and gives back those that hold, and one more. They never enter `token_ids` before that. While they are in flight
the sequence is planned on as if all of them held: `num_scheduled` and `num_pending` are upper bounds then, too high by
at most `num_in_doubt`, and come down as steps are settled. The device knows the truth one step earlier than the host,
so the runner can begin the next step in the right place. What only the host can prepare waits for it instead:
grammars, penalties, a minimum length, and whoever drafts from known tokens (`may_run_ahead`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from serve.engine.job import Job
from serve.errors import RequestFailed
from serve.events import FinishReason, TokenLogprobs
from serve.request import SamplingParams
from serve.text.grammar.grammar import Matcher
from serve.text.kv_cache import KVCache

PENDING = -1
"""In `Row.token_ids`: the token sampled for this job by the previous batch, known to the runner only. In `Row.drafts`:
a draft that the host does not know yet."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence(Job):
    """Token ids and how far they are computed. One choice of a request."""

    token_ids: list[int]
    """Prompt, then output. Grows in place."""
    num_prompt: int
    sampling: SamplingParams
    cache_salt: str = ""
    prompt_logprobs: int | None = None
    may_speculate: bool = True
    may_run_ahead: bool = False
    """Whether it is planned on while its drafts are in flight. Set by `add`."""
    matcher: Matcher | None = None
    """Where the output stands in its grammar. Follows `token_ids`, so preemption means nothing to it."""

    blocks: array[int] = field(default_factory=lambda: array("i"))
    """Block table, append-only while a step in flight may read it. What drafts leave unused at its end is freed."""
    num_computed: int = 0
    num_scheduled: int = 0
    num_pending: int = 0
    num_cached: int = 0
    """Prompt positions found in the prefix cache at the first admission."""
    num_preemptions: int = 0
    num_owed: int = 0
    """Positions that its admission is expected to bring to be computed, while it waits."""
    num_in_doubt: int = 0
    """Drafts in flight: so many of its scheduled positions may turn out not to be there."""
    num_drafted: int = 0
    num_accepted: int = 0
    """Draft tokens that were verified, and those of them that became output."""
    stop_token_id: int | None = None
    stop_logprobs: TokenLogprobs | None = None
    error: RequestFailed | None = None
    """Why it cannot go on, when it ends with `FinishReason.ERROR` by itself."""

    end_ids: frozenset[int] = frozenset()
    """The tokens that end it: `stop_token_ids`, and the model's own end tokens unless `ignore_eos`. Set by `add`."""
    prompt_scores: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    """Log-probabilities of the prompt's first tokens, as far as they are computed; the very first has none."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of `token_ids`; computed once, kept over preemption."""
    num_published: int = 0
    """Leading blocks that the prefix cache knows about."""
    last_step: int = -1
    """The last step that may write its blocks: they are freed when that one is settled."""

    # What differs for a beam request, which is one job and several sequences (`beams/group.py`).

    @property
    def owner(self) -> Sequence:
        """The job that this is, or is a beam of."""
        return self

    @property
    def holders(self) -> SequenceOf[Sequence]:
        """Those of this job that hold blocks."""
        return (self,)

    @property
    def num_seats(self) -> int:
        """Rows of a step that it may need at once."""
        return 1

    @property
    def num_candidates(self) -> int:
        """How many likeliest next tokens a step finds for it instead of sampling one. 0: it samples."""
        return 0

    @property
    def num_known(self) -> int:
        """Positions that an admission brings to be computed, cached ones included."""
        return len(self.token_ids)

    def split(self, num_new: int) -> SequenceOf[tuple[Sequence, int]]:
        """Who computes how many of `num_new` planned positions."""
        return ((self, num_new),)

    def allocate(self, kv_cache: KVCache, cached: list[int], reserve: int) -> bool:
        """Take blocks for all known positions, `cached` ones shared; False, and nothing taken, when they do not fit."""
        num_blocks = -(-len(self.token_ids) // kv_cache.block_size)
        blocks = kv_cache.allocate(cached, num_blocks - len(cached), reserve)
        if blocks is None:
            return False
        self.blocks, self.num_published = blocks, len(cached)
        self.num_computed = self.num_scheduled = len(cached) * kv_cache.block_size
        return True

    def grow(self, kv_cache: KVCache) -> bool:
        """Take what the next step of a decode needs; False, and nothing taken, when it is not free."""
        return self.num_scheduled < len(self.blocks) * kv_cache.block_size or kv_cache.extend(self.blocks)

    def forget_progress(self) -> None:
        """It holds no blocks any more."""
        self.blocks = array("i")
        self.num_computed = self.num_scheduled = self.num_pending = self.num_in_doubt = self.num_published = 0

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        """Positions to be computed in its life: the last token is delivered and never computed."""
        return self.num_prompt + max(self.sampling.max_tokens - 1, 0)

    @property
    def is_scored(self) -> bool:
        """Whether nothing is left to do about the prompt's log-probabilities."""
        return self.prompt_logprobs is None or len(self.prompt_scores) == self.num_prompt

    @property
    def num_wanted(self) -> int:
        """How many positions could be computed now, drafts not counted."""
        if self.num_in_doubt and not (self.may_run_ahead and self.num_output >= self.sampling.min_tokens):
            return 0  # where it goes on is not known yet
        if self.num_pending and self.num_scheduled == self.num_to_compute:
            return 0  # the pending token is the last one
        if self.num_pending > 1 and (self.sampling.needs_history or self.matcher is not None):
            return 0  # penalties and grammars follow the known tokens and the newest; here is a gap between them
        return len(self.token_ids) + self.num_pending - self.num_scheduled

    def next_row(self, num_new: int, step: int, num_drafts: int) -> Row:
        """Schedule its next `num_new` positions."""
        ids, start = self.token_ids, self.num_scheduled
        end = start + num_new
        samples = end == len(ids) + self.num_pending and self.sampling.max_tokens > 0
        scores = self.prompt_logprobs is not None and start < self.num_prompt - 1 and not self.is_scored
        num_in_doubt = self.num_in_doubt
        self.num_scheduled = end + num_drafts
        self.num_pending += samples + num_drafts
        self.num_in_doubt += num_drafts
        self.last_step = step
        return Row(
            self,
            self.epoch,
            ids[start:end] if start < len(ids) else [PENDING],
            start,
            self.blocks,
            samples,
            end,
            scores,
            num_drafts,
            self.num_candidates,
            num_in_doubt,
        )

    def num_draftable(self, most: int) -> int:
        """Drafts, up to `most`, that a decode has use for: with the token after them its output is full."""
        return min(most, self.num_to_compute - len(self.token_ids) - self.num_pending) if self.may_speculate else 0

    def append(
        self, sampled: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None
    ) -> tuple[int, FinishReason | None]:
        """Take in sampled tokens up to the end: how many of them become output, and why it ends there if it does."""
        num_output, matcher = self.num_output, self.matcher
        for i, token_id in enumerate(sampled):
            if matcher is not None and matcher.failure is not None:
                self.error = RequestFailed(f"the output cannot go on: {matcher.failure}")
                return i, FinishReason.ERROR
            is_end = token_id in self.end_ids and num_output + i >= self.sampling.min_tokens
            if is_end or (matcher is not None and matcher.is_end(token_id)):
                self.stop_token_id, self.stop_logprobs = token_id, None if logprobs is None else logprobs[i]
                return i, FinishReason.STOP
            self.token_ids.append(token_id)
            if matcher is not None:
                matcher.accept(token_id)
                if matcher.is_complete:
                    return i + 1, FinishReason.STOP
            if num_output + i + 1 == self.sampling.max_tokens:
                return i + 1, FinishReason.LENGTH
        return len(sampled), None

    def take_scores(self, start: int, scores: list[TokenLogprobs] | None) -> tuple[TokenLogprobs | None, ...] | None:
        """Collect the prompt's log-probabilities over its chunks (this one begins at `start`); all of them once the
        prompt is done, else None. Before the step's tokens are appended."""
        if scores is not None:
            self.prompt_scores += scores[len(self.prompt_scores) - 1 - start : self.num_prompt - 1 - start]
        is_first_time = self.num_output == 0 and self.num_computed == self.num_prompt
        return tuple(self.prompt_scores) if is_first_time else None


@dataclass(slots=True)
class Row:
    """One sequence in one step. `job.sampling` and `job.token_ids` may be read by the sampler of the driver only."""

    job: Sequence
    epoch: int
    """The job's epoch when scheduled; the output is stale when it has changed since."""
    token_ids: list[int]
    """The new tokens to compute; the last may be PENDING."""
    start: int
    """Position of the first of them, as if all drafts in flight held."""
    block_table: array[int]
    """The sequence's own list, at least as long as this step needs. It may grow later, and what is there never changes:
    a preempted sequence gets a new list. So nothing is copied."""
    samples: bool
    """Whether the last position's logits choose a token (the chunk reaches the end of what is known)."""
    sample_position: int
    """Position of the (first) token to be sampled, likewise: the counter of the random stream."""
    scores_prompt: bool = False
    """Whether log-probabilities of the next prompt tokens are wanted for these positions."""
    num_drafts: int = 0
    """How many draft tokens may follow `token_ids`; the block table has room for them."""
    num_candidates: int = 0
    """More than 0: instead of drawing a token, find so many of the likeliest, with log-probabilities (a beam)."""
    num_in_doubt: int = 0
    """By how much, at most, the row really starts before `start`. The runner knows by how much exactly, on the device:
    `TokenLayout.behind`."""
    drafts: list[int] = field(default_factory=list)
    """The tokens proposed, by the runner; PENDING until its output is there where the host does not know them. Each
    wants logits too: the row samples after every one of them."""
    newest: int | None = None
    """What PENDING stands for, told by the runner where a grammar has to know."""

    def after(self, num_drafts: int) -> Row:
        """One draw: this row as if its first `num_drafts` drafts, and no others, were its newest tokens.

        `sample_position` is that of the draw; `drafts` are the tokens before it that `job.token_ids` does not have.
        """
        if not self.drafts:
            return self
        drafts = self.drafts[:num_drafts]
        return Row(
            self.job,
            self.epoch,
            self.token_ids + drafts,
            self.start,
            self.block_table,
            True,
            self.sample_position + num_drafts,
            num_in_doubt=self.num_in_doubt,
            drafts=drafts,
        )


@dataclass(slots=True)
class TokenBatch:
    """What one step computes: rows of different lengths, decodes and prefill chunks alike."""

    step: int
    rows: list[Row]
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to): blocks to be copied before anything is computed."""

    @property
    def jobs(self) -> list[Sequence]:
        return list(dict.fromkeys(row.job.owner for row in self.rows))

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) + row.num_drafts for row in self.rows)

    @property
    def stage(self) -> str:
        return ""

    @property
    def num_rows(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class TokenOutput:
    """One entry per row of the batch, in order."""

    token_ids: list[tuple[int, ...]]
    """The sampled tokens: accepted drafts and one more; none for a row that does not sample, or gives candidates."""
    logprobs: list[tuple[TokenLogprobs, ...] | None]
    """One entry a sampled token, for rows that ask."""
    prompt_logprobs: list[list[TokenLogprobs] | None]
    """For rows that score: entry i is about the token at position start + i + 1."""
    candidates: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """Row → (token id, log-probability) of those likeliest to follow, best first, for rows that ask."""
    seconds: float = 0.0
    """What the step took, drafting included."""
    is_typical: bool = True
    """Whether such a step will take as long again: false when a draft model first had to catch up."""


@dataclass(slots=True)
class TokenUpdate:
    """What a step gives one sequence: the `output` of an engine update. Not frozen, which would triple its cost."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
