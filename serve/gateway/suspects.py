"""Which requests may be what kills replicas: those that all replicas had that were lost with them.

One that alone was at each of two lost replicas is convicted. Several that shared them are tried again, one at a time:
the next replica that dies names the one that was on trial, and whoever yields something there is cleared. What kills a
replica does so again at once, for it goes on where it stopped. So a request that kills has three replicas at most, and
its neighbours keep theirs.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence

REMEMBERED = 64
"""Lost replicas."""


class Suspects:
    """One per gateway, on its event loop."""

    def __init__(self) -> None:
        self._had: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._trials: dict[str, asyncio.Lock] = {}

    def record(self, replica_id: str, request_ids: Iterable[str]) -> None:
        """A replica was lost that had these requests of this gateway; told once or, as they learn of it, again."""
        self._had[replica_id] = self._had.get(replica_id, frozenset()).union(request_ids)
        if len(self._had) > REMEMBERED:
            self._had.popitem(last=False)

    def are_several(self, request_id: str, lost: Sequence[str]) -> bool:
        """Whether another request was at all these replicas too."""
        shared = frozenset.intersection(*(self._had.get(replica_id, frozenset()) for replica_id in lost))
        return bool(shared - {request_id})

    def trial(self, model: str) -> asyncio.Lock:
        """Held by the one suspect of `model` that is tried."""
        return self._trials.setdefault(model, asyncio.Lock())
