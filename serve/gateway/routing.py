"""Which replica gets a request: the one where it is predicted to cost the least time.

    cost in seconds = predicted backlog there + own work there x seconds a unit there

    backlog    as the replica last reported (`Load.backlog_s`), and what this gateway has sent there since, at its own
               estimate
    own work   text: prompt positions that are not cached there; images: pixels of all rows of all denoise steps

The least cost wins. Costs up to `TIE_SHARE` and `TIE_S` above the least count as equal to it, and among those the
highest rendezvous hash of (session, replica) goes first: so a session stays with its replica at a price of at most
that, and of n replicas one that comes or goes moves 1/n of the sessions (Thaler and Ravishankar, 1996).

Affinity is no rule of its own. A cached prefix is worth the seconds that computing it would take, and yields to load as
soon as the replica that has it is busier than another by more than that.

Who has which prefix is told by the replicas (`serve/prefix_view.py`). A prompt that was just sent somewhere counts as
cached there already, as long as it may take to be computed: requests with a common prefix that arrive together meet.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from serve.backend import Load
from serve.prefix_view import PrefixView, prompt_keys
from serve.request import ImageRequest, Request, TextRequest

TIE_SHARE, TIE_S = 0.1, 0.005
"""Predictions are no better than that: a tenth, and half a decode step of a slow model."""
MAX_KEYS = 1024
"""Blocks of a prompt that are looked up; 16 000 positions, 1 ms of hashing. What follows counts as not cached."""
PROMISE_S = 1.0
"""How long, beside twice the predicted cost, a prompt may take to show up in the replica's digest."""
MAX_REMEMBERED = 1 << 16
"""Promised blocks, and requests with their work; about 10 MB."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the request, and what it has told."""

    replica_id: str
    load: Load
    prefixes: PrefixView = field(default_factory=PrefixView)
    unreported: Collection[str] = ()
    """Ids of the requests that this gateway has sent there and `load` does not count."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A request at a candidate."""

    replica_id: str
    wait_s: float
    """How much longer than alone it will take there."""
    work_s: float
    """What it adds to the backlog there."""
    keys: tuple[int, ...]
    """Of its prompt, as the replica will publish them."""

    @property
    def cost_s(self) -> float:
        return self.wait_s + self.work_s


class Router:
    """Ranks replicas. One per gateway, on its event loop."""

    def __init__(self, *, max_remembered: int = MAX_REMEMBERED, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_remembered = max_remembered
        self._clock = clock
        self._promises: OrderedDict[int, tuple[str, float]] = OrderedDict()
        """Key of a block → the replica that will have it soon, and until when to believe that; oldest first."""
        self._work_s: OrderedDict[str, float] = OrderedDict()
        """Request id → what it adds to the backlog where it was sent."""

    def rank(self, request: Request, candidates: Sequence[Candidate]) -> list[Prediction]:
        """All candidates, best first. An only one is not asked what it has cached: hashing 8000 positions takes half a
        millisecond."""
        keys: dict[int, tuple[int, ...]] = {}
        if len(candidates) == 1:
            keys[candidates[0].prefixes.block_size] = ()
        now = self._clock()
        predictions = [self._place(request, candidate, keys, now) for candidate in candidates]
        least = min((prediction.cost_s for prediction in predictions), default=0.0)
        limit = least * (1 + TIE_SHARE) + TIE_S
        session = request.session or request.request_id

        def order(prediction: Prediction) -> tuple[float, int]:
            if prediction.cost_s > limit:
                return prediction.cost_s, 0
            return least, -_rendezvous(session, prediction.replica_id)

        return sorted(predictions, key=order)

    def record(self, request: Request, prediction: Prediction) -> None:
        """The request is being sent there."""
        until = self._clock() + PROMISE_S + 2 * prediction.cost_s
        for key in prediction.keys:
            self._promises[key] = prediction.replica_id, until
            self._promises.move_to_end(key)
        self._work_s[request.request_id] = prediction.work_s
        self._work_s.move_to_end(request.request_id)
        for memory in (self._promises, self._work_s):
            while len(memory) > self._max_remembered:
                memory.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        self._promises = OrderedDict(item for item in self._promises.items() if item[1][0] != replica_id)

    def _place(
        self, request: Request, candidate: Candidate, keys: dict[int, tuple[int, ...]], now: float
    ) -> Prediction:
        """`keys`: of the prompt, by block size, as far as they are known."""
        load = candidate.load
        work_s = request.n * load.job_s
        found: tuple[int, ...] = ()
        if isinstance(request, ImageRequest):
            work_s += _num_pixels(request) * load.unit_s
        else:
            block_size = candidate.prefixes.block_size
            if block_size not in keys:
                keys[block_size] = _keys(request, block_size)
            found = keys[block_size]
            num_cached = 0 if request.prompt_logprobs is not None else self._num_held(candidate, found, now)
            work_s += (len(request.prompt_token_ids) - num_cached * block_size) * load.unit_s
        sent_s = sum(self._work_s.get(request_id, 0.0) for request_id in candidate.unreported)
        return Prediction(candidate.replica_id, load.backlog_s + sent_s, work_s, found)

    def _num_held(self, candidate: Candidate, keys: tuple[int, ...], now: float) -> int:
        """How many leading blocks the candidate has, or was sent."""
        for i, key in enumerate(keys):
            if key in candidate.prefixes.keys:
                continue
            holder, until = self._promises.get(key, ("", 0.0))
            if holder != candidate.replica_id or until < now:
                return i
        return len(keys)


def _keys(request: TextRequest, block_size: int) -> tuple[int, ...]:
    if not block_size:
        return ()
    ids = request.prompt_token_ids[: MAX_KEYS * block_size + 1]
    return tuple(prompt_keys(ids, block_size, request.cache_salt))


def _num_pixels(request: ImageRequest) -> int:
    num_rows = 2 if request.guidance_scale > 1 else 1
    return request.n * request.num_inference_steps * num_rows * request.width * request.height


def _rendezvous(session: str, replica_id: str) -> int:
    return int.from_bytes(blake2b(f"{session}\0{replica_id}".encode(), digest_size=8).digest())
