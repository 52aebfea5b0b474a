"""What a sequence may ask for: refused at the door is what could never run, by name, value and remedy."""

from __future__ import annotations

from dataclasses import dataclass

from serve.errors import ContextTooLong, InvalidRequest
from serve.text.beams.group import BeamGroup
from serve.text.beams.params import check_beams
from serve.text.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a model and its cache can take. A sequence within them can be run to its end, if need be alone."""

    max_model_len: int
    """Positions of the model: prompt and output together."""
    kv_cache_tokens: int
    """Positions that the whole KV cache holds."""
    vocab_size: int
    max_num_seqs: int
    """Rows of a step."""
    block_size: int
    """Positions of a block of the KV cache."""

    def check(self, seq: Sequence) -> None:
        """Raise `InvalidRequest`. Reads only, on any thread."""
        num_prompt, max_tokens = seq.num_prompt, seq.sampling.max_tokens
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        if max_tokens < 0:
            raise InvalidRequest(f"max_tokens is {max_tokens}; it must be at least 0", param="max_tokens")
        self._check_ids("prompt", seq.token_ids)
        self._check_ids("stop_token_ids", seq.sampling.stop_token_ids)
        self._check_ids("logit_bias", [token_id for token_id, _ in seq.sampling.logit_bias])
        for num_needed, limit, what in (
            (num_prompt + max_tokens, self.max_model_len, "model's context"),
            (seq.num_to_compute, self.kv_cache_tokens, "whole KV cache"),
        ):
            if num_needed > limit:
                raise ContextTooLong(
                    f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together more than the "
                    f"{limit} positions of the {what}; shorten the prompt or lower max_tokens",
                    param="prompt" if num_prompt >= limit else "max_tokens",
                )

        if isinstance(seq, BeamGroup):
            self._check_beams(seq)

    def _check_beams(self, group: BeamGroup) -> None:
        """What beams can be combined with, and whether all of them fit at their longest."""
        sampling, beams = group.sampling, group.sampling.beams
        assert beams is not None
        check_beams(sampling, beams, num_returned=group.num_returned)
        if group.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be combined with beams; ask without", param="prompt_logprobs")
        if beams.num_beams > self.max_num_seqs:
            raise InvalidRequest(
                f"num_beams is {beams.num_beams}, more than the {self.max_num_seqs} sequences of a step "
                f"(max_num_seqs); lower num_beams",
                param="num_beams",
            )
        num_shared = group.num_prompt // self.block_size
        num_own = -(-group.num_to_compute // self.block_size) - num_shared
        num_blocks, num_needed = self.kv_cache_tokens // self.block_size, num_shared + beams.num_beams * num_own
        if num_needed > num_blocks:
            raise ContextTooLong(
                f"{beams.num_beams} beams of {group.num_prompt} prompt tokens and max_tokens {sampling.max_tokens} may "
                f"need {num_needed} blocks of {self.block_size} positions, more than the {num_blocks} of the whole KV "
                f"cache; lower num_beams or max_tokens",
                param="num_beams",
            )

    def _check_ids(self, name: str, ids: list[int] | tuple[int, ...]) -> None:
        for token_id in min(ids, default=0), max(ids, default=0):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"{name} has the token id {token_id}, outside the vocabulary of {self.vocab_size} tokens; "
                    f"use ids from 0 to {self.vocab_size - 1}",
                    param=name,
                )
