"""Refusing at the door what would wait too long, and saying when to come back.

A request that is predicted to wait longer than it may, at every replica, is refused instead of accepted to time out.
`Retry-After` is when the least busy replica will have worked off what is too much, or when one that loads is due.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from serve.errors import Overloaded
from serve.gateway.routing import Prediction
from serve.request import Request
from serve.wire import ReplicaEntry


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
