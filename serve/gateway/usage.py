"""Parts of answers that chat and completions share: usage, log-probabilities, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from serve.events import TokenLogprobs
from serve.gateway.text_generation import Tokens
from serve.request import ModelCard
from serve.text.detokenizer import Detokenizer
from serve.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (vLLM's choice)."""


def usage(tokens: Tokens) -> dict[str, Any]:
    """OpenAI's CompletionUsage."""
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": tokens.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": tokens.accepted,
            "rejected_prediction_tokens": tokens.rejected,
        },
    }


def fingerprint(card: ModelCard) -> str:
    """Changes when what computes the tokens changes: the model, its weights' source, precision or device."""
    text = f"{card.name}|{card.source}|{card.device}|{card.dtype}|{card.num_parameters}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]


class Logprobs:
    """Log-probabilities in both wire formats."""

    def __init__(self, tokenizer: Tokenizer, *, num_top: int, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_token_ids = as_token_ids

    def chat(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`choices[].logprobs` of chat completions."""
        content = []
        for entry in entries:
            top = [self._chat_token(token_id, value) for token_id, value in entry.top[: self._num_top]]
            content.append({**self._chat_token(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: Sequence[int]
    ) -> dict[str, Any]:
        """`choices[].logprobs` of completions. The first token of a prompt has no entry. `top_logprobs` holds the token
        itself too, as OpenAI's does."""
        tokens, values, tops = [], [], []
        for token_id, entry in zip(token_ids, entries):
            tokens.append(self._token(token_id))
            values.append(None if entry is None else finite(entry.logprob))
            tops.append(None if entry is None else self._top(entry))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def prompt(self, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: token id → {logprob, rank, decoded_token} at every position but the first."""
        return [None if entry is None else self._ranked(entry) for entry in entries]

    def _ranked(self, entry: TokenLogprobs) -> dict[str, Any]:
        ranked = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top, start=1)}
        ranked.setdefault(entry.token_id, (entry.logprob, entry.rank))
        return {
            str(token_id): {
                "logprob": finite(value),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, (value, rank) in ranked.items()
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, value in (*entry.top[: self._num_top], (entry.token_id, entry.logprob)):
            top.setdefault(self._token(token_id), finite(value))  # of two tokens with one text the likelier stays
        return top

    def _chat_token(self, token_id: int, value: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._token(token_id), "logprob": finite(value), "bytes": list(raw)}

    def _token(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else self._tokenizer.token_text(token_id)


class TextOffsets:
    """Where the text of each token begins in a choice's text: tokens of one character share its place, and tokens that
    are left out of the text take no room."""

    def __init__(self, detokenizer: Detokenizer, start: int = 0) -> None:
        self._detokenizer = detokenizer
        self._end = start

    def push(self, token_ids: Sequence[int]) -> list[int]:
        offsets = []
        for token_id in token_ids:
            offsets.append(self._end)
            self._end += len(self._detokenizer.push((token_id,)))
        return offsets


def finite(value: float) -> float:
    return value if value > LEAST_LOGPROB else LEAST_LOGPROB
