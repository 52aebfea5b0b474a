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

Of more than `NUM_DRAWN` replicas a few are looked at (`shortlist.py`), and the others only if none of these will do.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from serve.backend import Load
from serve.gateway.shortlist import NUM_DRAWN, NUM_HOLDERS, home, longest_holders, rendezvous
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


class Candidate(Protocol):
    """A replica that could take the request, and what it has told (a `Remote` of the pool's)."""

    @property
    def prefixes(self) -> PrefixView:
        """Which prefixes it has cached."""
        ...

    @property
    def unreported(self) -> Collection[str]:
        """Ids of the requests that this gateway has sent there and `load` does not count."""
        ...

    def load(self) -> Load: ...


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

    def __init__(
        self,
        *,
        seed: str = "",
        num_drawn: int = NUM_DRAWN,
        max_remembered: int = MAX_REMEMBERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seed`: differs from gateway to gateway, so that they draw different replicas."""
        self._random = random.Random(seed)
        self._num_drawn = num_drawn
        self._max_remembered = max_remembered
        self._clock = clock
        self._promises: OrderedDict[int, tuple[str, float]] = OrderedDict()
        """Key of a block → the replica that will have it soon, and until when to believe that; oldest first."""
        self._work_s: OrderedDict[str, float] = OrderedDict()
        """Request id → what it adds to the backlog where it was sent."""

    def rounds(self, request: Request, candidates: Mapping[str, Candidate]) -> Iterator[list[Prediction]]:
        """All candidates, those looked at first and then, for whoever goes on, the others; each round best first.

        An only one is not asked what it has cached: hashing 8000 positions takes half a millisecond."""
        prompt = _Prompt(request, is_looked_up=len(candidates) > 1)
        shortlist = candidates
        if len(candidates) > self._num_drawn:
            shortlist = {name: candidates[name] for name in self._draw(prompt, candidates)}
        yield self._rank(prompt, shortlist)
        if others := {name: each for name, each in candidates.items() if name not in shortlist}:
            yield self._rank(prompt, others)

    def _draw(self, prompt: _Prompt, candidates: Mapping[str, Candidate]) -> dict[str, None]:
        """Names of those that are worth a look."""
        names = list(candidates)
        chosen = dict.fromkeys(self._random.sample(names, self._num_drawn))
        views = [(name, candidate.prefixes) for name, candidate in candidates.items()]
        for block_size in {view.block_size for _, view in views}:
            keys = prompt.keys(block_size)
            holdings = [(name, view.keys) for name, view in views] if keys else ()
            chosen |= dict.fromkeys(longest_holders(keys, holdings, NUM_HOLDERS, self._random))
            promised = next((self._promises[key][0] for key in reversed(keys) if key in self._promises), "")
            if promised in candidates:
                chosen[promised] = None
        if prompt.request.session:
            chosen[home(prompt.request.session, names)] = None
        return chosen

    def _rank(self, prompt: _Prompt, candidates: Mapping[str, Candidate]) -> list[Prediction]:
        now = self._clock()
        predictions = [self._place(prompt, name, candidate, now) for name, candidate in candidates.items()]
        least = min((prediction.cost_s for prediction in predictions), default=0.0)
        limit = least * (1 + TIE_SHARE) + TIE_S
        session = prompt.request.session or prompt.request.request_id
        affinity = dict(zip(candidates, rendezvous(session, candidates)))

        def order(prediction: Prediction) -> tuple[float, int]:
            if prediction.cost_s > limit:
                return prediction.cost_s, 0
            return least, -affinity[prediction.replica_id]

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

    def _place(self, prompt: _Prompt, name: str, candidate: Candidate, now: float) -> Prediction:
        request, load = prompt.request, candidate.load()
        work_s = request.n * load.job_s
        keys: tuple[int, ...] = ()
        if isinstance(request, ImageRequest):
            work_s += _num_pixels(request) * load.unit_s
        else:
            block_size = candidate.prefixes.block_size
            keys = prompt.keys(block_size)
            scores_all = request.prompt_logprobs is not None
            num_cached = 0 if scores_all else self._num_held(name, candidate.prefixes.keys, keys, now)
            work_s += (len(request.prompt_token_ids) - num_cached * block_size) * load.unit_s
        sent_s = sum([self._work_s.get(request_id, 0.0) for request_id in candidate.unreported])
        return Prediction(name, load.backlog_s + sent_s, work_s, keys)

    def _num_held(self, name: str, held: set[int], keys: tuple[int, ...], now: float) -> int:
        """How many leading blocks the candidate has, or was sent."""
        num = len(keys)
        if not held.issuperset(keys):
            num = bisect_left(range(1, num), True, key=lambda num: not held.issuperset(keys[:num]))
        for key in keys[num:]:
            holder, until = self._promises.get(key, ("", 0.0))
            if key not in held and (holder != name or until < now):
                break
            num += 1
        return num


class _Prompt:
    """A request, and the keys of its blocks, which are hashed when they are first asked for."""

    def __init__(self, request: Request, *, is_looked_up: bool):
        self.request = request
        self._text = request if is_looked_up and isinstance(request, TextRequest) else None
        self._keys: dict[int, tuple[int, ...]] = {0: ()}

    def keys(self, block_size: int) -> tuple[int, ...]:
        """As a cache with blocks of that size publishes them; 0: it has none."""
        if self._text is None:
            return ()
        if block_size not in self._keys:
            ids = self._text.prompt_token_ids[: MAX_KEYS * block_size + 1]
            self._keys[block_size] = tuple(prompt_keys(ids, block_size, self._text.cache_salt))
        return self._keys[block_size]


def _num_pixels(request: ImageRequest) -> int:
    num_rows = 2 if request.guidance_scale > 1 else 1
    return request.n * request.num_inference_steps * num_rows * request.width * request.height
