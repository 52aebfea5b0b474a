"""The rules that routing is compared with: each in the place of the gateway's `Router`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from serve.gateway.routing import Candidate, Prediction, Router
from serve.request import Request


class RoundRobin(Router):
    """In turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def rank(self, request: Request, candidates: Sequence[Candidate]) -> list[Prediction]:
        self._turn += 1
        return [_prediction(candidates[(self._turn + i) % len(candidates)]) for i in range(len(candidates))]


class TwoChoices(Router):
    """Of two drawn at random the one with fewer requests (Mitzenmacher, 2001): Ray Serve's own rule."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def rank(self, request: Request, candidates: Sequence[Candidate]) -> list[Prediction]:
        drawn = self._random.sample(candidates, len(candidates))
        return [_prediction(candidate) for candidate in (*sorted(drawn[:2], key=_num_requests), *drawn[2:])]


class FewestRequests(Router):
    """Least loaded by the number of requests, equal ones in random order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def rank(self, request: Request, candidates: Sequence[Candidate]) -> list[Prediction]:
        drawn = self._random.sample(candidates, len(candidates))
        return [_prediction(candidate) for candidate in sorted(drawn, key=_num_requests)]


def _num_requests(candidate: Candidate) -> int:
    return candidate.load.running + candidate.load.waiting + len(candidate.unreported)


def _prediction(candidate: Candidate) -> Prediction:
    return Prediction(candidate.replica_id, 0.0, 0.0, ())
