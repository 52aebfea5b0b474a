"""The text side of one choice: token ids in, text out, until the engine or a stop string ends it.

Stop strings are text, so engines know nothing of them: the gateway finds them and ends the choice by cancelling it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.events import Finished, FinishReason, TokenDelta, TokenLogprobs
from serve.gateway.parsing.events import CallEnd, CallStart, Parsed
from serve.gateway.reading import Reading
from serve.text.stop_matcher import StopMatcher
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine step added to a choice. `finish_reason` is "stop", "length" or "tool_calls" on the last one."""

    index: int
    text: str
    """As generated; what it means is in `parsed` where a reading was asked for."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or token id of the request that ended it (vLLM's extra)."""
    parsed: tuple[Parsed, ...] = ()
    score: float | None = None
    """Of a beam's output, on its last piece."""


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
    reading: Reading | None = None
    """How calls and reasoning are found in the text. None: the text is the answer."""


class Choice:
    """One choice in progress."""

    def __init__(self, index: int, tokenizer: Tokenizer, options: TextOptions) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_cached = 0
        self.num_accepted = self.num_rejected = 0
        """Drafts; told with the end, so unknown of a choice that a stop string ended."""
        self.num_reasoning = 0
        """Tokens of reasoning, its tags included."""
        self.is_finished = False
        self.finish_reason: str | None = None
        self._options = options
        reading = options.reading
        self._parser = None if reading is None else reading.parser()
        self._ends_with_call = reading is not None and reading.ends_with_call
        self._has_called = False
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=options.skip_special_tokens, shown=None if reading is None else reading.shown
        )
        self._matcher = StopMatcher(options.stops, include=options.include_stop)

    def push(self, deltas: Sequence[TokenDelta]) -> Piece | None:
        """The new tokens as text. None when nothing is to be said (the choice has ended, or output is discarded)."""
        if deltas and deltas[0].num_cached is not None:
            self.num_cached = deltas[0].num_cached
        if self.is_finished or self._options.discard:
            return None
        ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs or ())
        if not self._options.stops and self._parser is None:
            self.num_tokens += len(ids)
            return Piece(self.index, self._detokenizer.push(ids), ids, logprobs)
        text, parsed = list[str](), list[Parsed]()
        for count, token_id in enumerate(ids, start=1):
            self.num_tokens += 1
            safe, stop = self._detokenizer.push((token_id,)), None
            if self.num_tokens > self._options.min_tokens:
                safe, stop = self._matcher.push(safe)
            text.append(safe)
            is_over = self._parse(safe, parsed, num_tokens=1)
            if stop is not None or is_over:
                self.is_finished = True
                self._end_parsing(parsed)
                reason = self.finish_reason = "tool_calls" if self._has_called else "stop"
                return Piece(self.index, "".join(text), ids[:count], logprobs[:count], reason, stop, tuple(parsed))
        return Piece(self.index, "".join(text), ids, logprobs, parsed=tuple(parsed))

    def finish(self, finished: Finished) -> Piece | None:
        """The last piece: text held back, the end token, and why it ended. None when a stop string had ended it before.

        The end token is counted and scored like any other, but it is text only when stops are to be included."""
        used = finished.usage
        self.num_cached = used.cached_tokens
        self.num_accepted, self.num_rejected = used.accepted_tokens, used.rejected_tokens
        if self.is_finished:
            return None
        self.is_finished = True
        if self._options.discard:
            self.finish_reason = "length"
            return Piece(self.index, "", finish_reason="length")
        self.num_tokens = used.completion_tokens
        end = () if finished.stop_token_id is None else (finished.stop_token_id,)
        shown = self._detokenizer.push(end) if self._options.include_stop else ""
        text, stop = self._matcher.push(shown + self._detokenizer.finish())
        logprobs = () if finished.stop_logprobs is None else (finished.stop_logprobs,)
        text += "" if stop is not None else self._matcher.finish()
        parsed: list[Parsed] = []
        is_over = self._parse(text, parsed)
        self._end_parsing(parsed)
        reason = "stop" if finished.reason is FinishReason.STOP or stop is not None or is_over else "length"
        if reason == "stop" and self._has_called:
            reason = "tool_calls"
        self.finish_reason = reason
        asked_for = finished.stop_token_id if finished.stop_token_id in self._options.stop_token_ids else None
        stopped_by = asked_for if stop is None else stop
        return Piece(self.index, text, end, logprobs, reason, stopped_by, tuple(parsed), finished.score)

    def _parse(self, text: str, parsed: list[Parsed], *, num_tokens: int = 0) -> bool:
        """Add what the text of so many tokens means. Whether the answer is over: it was to end with its first call."""
        if self._parser is None:
            return False
        was_reasoning = self._parser.is_reasoning
        events = self._parser.push(text)
        if was_reasoning or self._parser.is_reasoning:
            self.num_reasoning += num_tokens
        for event in events:
            parsed.append(event)
            self._has_called = self._has_called or isinstance(event, CallStart)
            if self._ends_with_call and isinstance(event, CallEnd):
                self._parser = None  # what the same token says after it is not told
                return True
        return False

    def _end_parsing(self, parsed: list[Parsed]) -> None:
        if self._parser is not None:
            parsed += self._parser.finish()
