"""A sequence: one generation over tokens, and the batch in which it travels to the runner.

    | num_cached (prefix hit) | computed earlier | scheduled, in flight | not yet scheduled |
    0                                            ^ num_computed         ^ num_scheduled     ^ len(token_ids)

`num_scheduled` runs ahead of `num_computed` while steps are in flight. A token that a step in flight will sample is not
in `token_ids` yet: the scheduler counts it as `num_pending`, the runner knows its value on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.engine.job import Job
from serve.events import TokenLogprobs
from serve.request import SamplingParams

PENDING = -1
"""In `Row.token_ids`: the token sampled for this job by the previous batch, known to the runner only."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence(Job):
    """Token ids and how far they are computed. One choice of a request."""

    token_ids: list[int]
    """Prompt, then output. Grows in place."""
    num_prompt: int
    sampling: SamplingParams
    cache_salt: str = ""
    prompt_logprobs: int | None = None

    blocks: list[int] = field(default_factory=list)
    """Block table, append-only while running."""
    num_computed: int = 0
    num_scheduled: int = 0
    num_pending: int = 0
    num_cached: int = 0
    """Prompt positions found in the prefix cache at the first admission."""
    num_preemptions: int = 0
    stop_token_id: int | None = None
    stop_logprobs: TokenLogprobs | None = None

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


@dataclass(slots=True)
class Row:
    """One sequence in one step. `job.sampling` and `job.token_ids` may be read by the sampler of the driver only."""

    job: Sequence
    epoch: int
    """The job's epoch when scheduled; the output is stale when it has changed since."""
    token_ids: list[int]
    """The new tokens to compute; the last may be PENDING."""
    start: int
    """Position of the first of them."""
    block_table: list[int]
    """The sequence's own list, at least as long as this step needs. It may grow later, and what is there never changes:
    a preempted sequence gets a new list. So nothing is copied."""
    samples: bool
    """Whether the last position's logits choose a token (the chunk reaches the end of what is known)."""
    sample_position: int
    """Position of the token to be sampled: the counter of the random stream."""
    scores_prompt: bool = False
    """Whether log-probabilities of the next prompt tokens are wanted for these positions."""


@dataclass(slots=True)
class TokenBatch:
    """What one step computes: rows of different lengths, decodes and prefill chunks alike."""

    step: int
    rows: list[Row]

    @property
    def jobs(self) -> list[Sequence]:
        return [row.job for row in self.rows]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def stage(self) -> str:
        return ""

    @property
    def num_rows(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class TokenOutput:
    """One entry per row of the batch, in order."""

    token_ids: list[int | None]
    """The sampled token, or None for a row that does not sample."""
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs] | None]
    """For rows that score: entry i is about the token at position start + i + 1."""


@dataclass(slots=True)
class TokenUpdate:
    """What a step gives one sequence: the `output` of an engine update. Not frozen, which would triple its cost."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
