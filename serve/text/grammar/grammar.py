"""The grammar of one sequence: which tokens may come next, over llguidance.

Why llguidance and not xgrammar, measured in `loadtest/results/grammar.md`: it refuses what it cannot enforce where
xgrammar is silent (`not`, `uniqueItems`, `multipleOf`, ...), bounds its work per step by fuel, compiles in a
millisecond because it builds its automata as they are used, and is one wheel of 8 MB without dependencies.

A matcher belongs to its sequence, so it survives preemption as the tokens do. It follows settled tokens; what may come
after drafts is looked up and taken back. It never ends a text itself but for one case: a complete output to which
nothing can be added needs no end token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.request import SamplingParams
from serve.text.grammar.vocabulary import Vocabulary

CPU_S_PER_TOKEN = 0.003
CPU_S_SPARE = 0.5
"""What all sequences of one grammar may spend on masks together, on average and on top. Ordinary schemas need 0.0001 s
a token over 150k tokens; who needs thirty times that would slow everybody's steps."""


@dataclass(slots=True)
class Cost:
    """CPU seconds that the sequences of one grammar have spent on masks, and for how many tokens."""

    seconds: float = 0.0
    num_masks: int = 0

    @property
    def is_too_high(self) -> bool:
        return self.seconds > CPU_S_SPARE + CPU_S_PER_TOKEN * self.num_masks


class Matcher:
    """Where one output stands in its grammar. One thread."""

    def __init__(self, core: Any, vocabulary: Vocabulary, sampling: SamplingParams, cost: Cost):
        special = set(vocabulary.special.values())
        self._failure: tuple[int, str] | None = None
        """After how many tokens, and why."""
        self._core = core
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._cost = cost
        self._end_ids = frozenset(vocabulary.end_ids).union(
            token_id for token_id in sampling.stop_token_ids if token_id in special
        )
        self._num_accepted = 0

    @property
    def failure(self) -> str | None:
        """Why no token can be chosen here: this output fails."""
        return None if self._failure is None or self._failure[0] > self._num_accepted else self._failure[1]

    def fork(self) -> Matcher:
        """Another one at the same place."""
        twin = Matcher(self._core.deep_copy(), self._vocabulary, self._sampling, self._cost)
        twin._failure, twin._num_accepted = self._failure, self._num_accepted
        return twin

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that say so."""
        return self._end_ids

    def is_end(self, token_id: int) -> bool:
        """Whether this token says that the output is complete. The mask allows it only where that is so."""
        return token_id in self._end_ids

    @property
    def is_complete(self) -> bool:
        """Whether nothing can be added."""
        return self._failure is None and bool(self._core.is_stopped())

    def accept(self, token_id: int) -> None:
        """Follow a settled token that is no end."""
        self._num_accepted += 1
        if not self._core.consume_token(token_id):
            self._fail(f"token {token_id} is not what the grammar allows: {self._core.get_error()}")

    def num_legal(self, drafts: Sequence[int]) -> int:
        """How many of these tokens, from the first, could come next."""
        return 0 if self._failure is not None else int(self._core.validate_tokens(list(drafts)))

    def mask(self, drafts: Sequence[int] = ()) -> bytes | None:
        """The tokens that may follow the accepted ones and then `drafts`: a bit each, the first the lowest of byte 0.

        None: not needed, as the drafts go beyond what the grammar allows; or there is none (`failure` says why).
        The end is left out before `min_tokens`, and with `ignore_eos`, wherever something else is allowed.
        """
        if self._failure is not None or any(token_id in self._end_ids for token_id in drafts):
            return None
        started = time.thread_time()  # not the clock on the wall: a stopped or busy machine is not the grammar's fault
        num_taken = self._core.try_consume_tokens(list(drafts)) if drafts else 0
        mask = bytearray(self._core.compute_bitmask()) if num_taken == len(drafts) else None
        error = self._core.get_error() if self._core.is_error() else None
        if num_taken:
            self._core.rollback(num_taken)
        self._cost.seconds += time.thread_time() - started
        self._cost.num_masks += 1
        if error is not None:
            self._fail(f"the grammar became too complex for the output so far: {error}")
        elif mask is not None and not self._settle_end(mask, self._num_accepted + num_taken):
            self._fail("the grammar has a dead end here: no token can follow, and the output may not end", num_taken)
        elif self._cost.is_too_high:
            self._fail(f"the grammar costs more than {1e3 * CPU_S_PER_TOKEN:g} ms a token; make it simpler")
        return None if mask is None or self._failure is not None else bytes(mask)

    def _settle_end(self, mask: bytearray, num_output: int) -> bool:
        """Decide where the end is allowed. False when nothing is left."""
        may_end = any(mask[token_id >> 3] >> (token_id & 7) & 1 for token_id in self._vocabulary.end_ids)
        for token_id in self._end_ids:
            mask[token_id >> 3] &= ~(1 << (token_id & 7))
        has_more = mask.count(0) < len(mask)
        holds_on = self._sampling.ignore_eos or num_output < self._sampling.min_tokens
        if may_end and not (has_more and holds_on):
            for token_id in self._end_ids:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        return may_end or has_more

    def _fail(self, reason: str, num_later: int = 0) -> None:
        self._failure = self._num_accepted + num_later, " ".join(reason.split())[:400]
