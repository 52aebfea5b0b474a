"""The text side of one choice: token ids in, text out, until the engine or a stop string ends it.

Stop strings are text, so engines know nothing of them: the gateway finds them and ends the choice by cancelling it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.events import Finished, FinishReason, TokenDelta, TokenLogprobs
from serve.text.stop_matcher import StopMatcher
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine step added to a choice. `finish_reason` is "stop" or "length" on the last one."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or token id of the request that ended it (vLLM's extra)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How ids become text, for all choices of a request."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    """Stop strings do not count before."""
    skip_special_tokens: bool = True
    stop_token_ids: tuple[int, ...] = ()
    discard: bool = False
    """Nothing was asked for (`max_tokens` 0): the one token engines need to produce is dropped."""


class Choice:
    """One choice in progress."""

    def __init__(self, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_cached = 0
        self.is_finished = False
        self._options = options
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self._matcher = StopMatcher(options.stops, include=options.include_stop)

    def push(self, deltas: Sequence[TokenDelta]) -> Piece | None:
        """The new tokens as text. None when nothing is to be said (the choice has ended, or output is discarded)."""
        if deltas and deltas[0].num_cached is not None:
            self.num_cached = deltas[0].num_cached
        if self.is_finished or self._options.discard:
            return None
        ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs or ())
        if not self._options.stops:
            self.num_tokens += len(ids)
            return Piece(self.index, self._detokenizer.push(ids), ids, logprobs)
        text = []
        for count, token_id in enumerate(ids, start=1):
            self.num_tokens += 1
            new = self._detokenizer.push((token_id,))
            if self.num_tokens <= self._options.min_tokens:
                text.append(new)
                continue
            safe, stop = self._matcher.push(new)
            text.append(safe)
            if stop is not None:
                self.is_finished = True
                return Piece(self.index, "".join(text), ids[:count], logprobs[:count], "stop", stop)
        return Piece(self.index, "".join(text), ids, logprobs)

    def finish(self, finished: Finished) -> Piece | None:
        """The last piece: text held back, the end token, and why it ended. None when a stop string had ended it before.

        The end token is counted and scored like any other, but it is text only when stops are to be included."""
        self.num_cached = finished.usage.cached_tokens
        if self.is_finished:
            return None
        self.is_finished = True
        if self._options.discard:
            return Piece(self.index, "", finish_reason="length")
        self.num_tokens = finished.usage.completion_tokens
        end = () if finished.stop_token_id is None else (finished.stop_token_id,)
        shown = self._detokenizer.push(end) if self._options.include_stop else ""
        text, stop = self._matcher.push(shown + self._detokenizer.finish())
        logprobs = () if finished.stop_logprobs is None else (finished.stop_logprobs,)
        if stop is not None:
            return Piece(self.index, text, end, logprobs, "stop", stop)
        reason = "stop" if finished.reason is FinishReason.STOP else "length"
        asked_for = finished.stop_token_id if finished.stop_token_id in self._options.stop_token_ids else None
        return Piece(self.index, text + self._matcher.finish(), end, logprobs, reason, asked_for)
