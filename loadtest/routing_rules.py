"""The rules that routing is compared with: each in the place of the gateway's `Router`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

from serve.gateway.routing import Candidate, Prediction, Router
from serve.request import Request


class RoundRobin(Router):
    """In turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def rounds(self, request: Request, candidates: Mapping[str, Candidate]) -> Iterator[list[Prediction]]:
        self._turn += 1
        names = list(candidates)
        yield _predictions(names[(self._turn + i) % len(names)] for i in range(len(names)))


class TwoChoices(Router):
    """Of two drawn at random the one with fewer requests (Mitzenmacher, 2001): Ray Serve's own rule."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def rounds(self, request: Request, candidates: Mapping[str, Candidate]) -> Iterator[list[Prediction]]:
        drawn = self._random.sample(list(candidates), len(candidates))
        yield _predictions((*sorted(drawn[:2], key=lambda name: _num_requests(candidates[name])), *drawn[2:]))


class FewestRequests(Router):
    """Least loaded by the number of requests, equal ones in random order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def rounds(self, request: Request, candidates: Mapping[str, Candidate]) -> Iterator[list[Prediction]]:
        drawn = self._random.sample(list(candidates), len(candidates))
        yield _predictions(sorted(drawn, key=lambda name: _num_requests(candidates[name])))


def _num_requests(candidate: Candidate) -> int:
    load = candidate.load()
    return load.running + load.waiting + len(candidate.unreported)


def _predictions(names: Iterable[str]) -> list[Prediction]:
    return [Prediction(name, 0.0, 0.0, ()) for name in names]
