"""The gateway's rule over a few replicas instead of all: what ranking would be for fleets of hundreds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from serve.gateway.routing import Candidate, Prediction, Router
from serve.request import Request


class SampledRouter(Router):
    """Ranks `num` drawn at random; the rest follows unranked, for when all of those refuse."""

    def __init__(self, num: int, *, seed: int = 0, clock: Callable[[], float]) -> None:
        super().__init__(clock=clock)
        self._num = num
        self._random = random.Random(seed)

    def rank(self, request: Request, candidates: Sequence[Candidate]) -> list[Prediction]:
        if len(candidates) <= self._num:
            return super().rank(request, candidates)
        return super().rank(request, self._random.sample(candidates, self._num))
