"""Refusing at the door what would wait too long, and saying when to come back.

A request that is predicted to wait longer than it may, at every replica, is refused instead of accepted to time out.
It is told to come back when the least busy replica will have worked off what is too much, or when one that loads is
due; those refused after it come later by the work of each, shared by the replicas, so that they find room one after the
other (`Returns`). What any refusal says goes out a little later than it says, at random (`errors.py`).
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence

from serve.errors import Overloaded
from serve.gateway.routing import Prediction
from serve.request import Request
from serve.wire import ReplicaEntry

MOST_BOOKED_S = 60.0
"""Who was told may have given up, and others come meanwhile: a later time would be a guess."""


class Coming:
    """The replicas that load, and since when this gateway knows of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._since: dict[str, tuple[str, float]] = {}
        """Replica → its model, and when it was first named."""

    def update(self, loading: Iterable[ReplicaEntry]) -> None:
        """All that load now."""
        now, before = self._clock(), self._since
        self._since = {entry.replica_id: before.get(entry.replica_id, (entry.model, now)) for entry in loading}

    def due_s(self, model: str, load_s: float) -> float | None:
        """Seconds until the next replica of `model` may be up, if each takes `load_s`; 0 when it is late, None when
        none is coming."""
        began = [since for name, since in self._since.values() if name == model]
        return max(0.0, min(began) + load_s - self._clock()) if began else None


class Returns:
    """When those that were refused come back, as far as this gateway has told them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._told: dict[str, list[float]] = {}
        """Model → when each of those for whom room is kept was told to come, in order."""

    def book(self, model: str, room_s: float, work_s: float) -> float:
        """Seconds until there may be room for one more request of `model`: the first time from `room_s` on at which
        nobody else was told to come, at most `MOST_BOOKED_S` after it. `work_s`: what a request takes of all replicas
        of the model together."""
        now = self._clock()
        told = [at for at in self._told.get(model, ()) if at + work_s > now]
        first = at = now + room_s
        for other in told:
            if at + work_s <= other:
                break
            at = max(at, other + work_s)
        if at < first + MOST_BOOKED_S:
            insort(told, at)
        self._told[model] = told
        return min(at, first + MOST_BOOKED_S) - now


def too_late(
    request: Request, taking: Sequence[Prediction], *, max_wait_s: float | None, due_s: float | None
) -> Overloaded | None:
    """The refusal of a request that is predicted to wait longer than it may at every one of `taking`, which take new
    ones; None when some has room in time, or when none takes any."""
    timeout_s = math.inf if request.timeout_s is None else request.timeout_s
    limit_s = min(timeout_s, math.inf if max_wait_s is None else max_wait_s)
    least_s = min((prediction.wait_s for prediction in taking), default=0.0)
    if least_s <= limit_s:
        return None
    retry_after_s = least_s - limit_s
    whose = "its own timeout of" if limit_s == timeout_s else "the limit here,"
    return Overloaded(
        f"the request would wait about {least_s:.0f} s, longer than {whose} {limit_s:g} s; try again later",
        retry_after_s=retry_after_s if due_s is None else min(retry_after_s, due_s),
    )
