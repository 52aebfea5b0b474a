"""What waits, in tokens: all known ones, and those that the prefix cache is expected to leave to be computed."""

from __future__ import annotations

from serve.text.sequence import Sequence


class Queued:
    """Books of the waiting and the parked sequences."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_owed = 0

    def enter(self, seq: Sequence, num_cached: int) -> None:
        self.num_tokens += len(seq.token_ids)
        self.expect(seq, num_cached)

    def expect(self, seq: Sequence, num_cached: int) -> None:
        """It will find so many positions cached when it is admitted."""
        self.num_owed -= seq.num_owed
        seq.num_owed = len(seq.token_ids) - num_cached
        self.num_owed += seq.num_owed

    def leave(self, seq: Sequence) -> None:
        self.num_tokens -= len(seq.token_ids)
        self.num_owed -= seq.num_owed
        seq.num_owed = 0
