"""How many draft tokens the next step verifies behind each decode."""

from __future__ import annotations

from typing import Protocol

from serve.text.sequence import TokenBatch, TokenOutput


class DraftLength(Protocol):
    """Chooses from what it has observed. No clock: durations come with the outputs."""

    def choose(self, num_rows: int) -> int:
        """Drafts a row, at most, for a step of `num_rows` sequences. Changes nothing: it may be asked in vain."""
        ...

    def observe(self, batch: TokenBatch, output: TokenOutput) -> None:
        """A step was computed."""
        ...
