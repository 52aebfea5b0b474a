"""When Ray Serve has told this replica to stop.

Serve takes a replica that is to stop out of its routers, waits until it has no calls open, and kills it. Ours has to
know at once: it refuses what still comes, and hands over to others what it cannot finish in time. Serve has no hook for
that (2.56: `__del__` is called after the wait), so its own flag is read; where a later version has none, the streams of
a replica that Serve kills go on elsewhere as after a death.
"""

from __future__ import annotations

import asyncio
import logging

from ray._private.worker import global_worker

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 0.1


async def told_to_stop() -> None:
    """Return when it has been."""
    actor = next(iter(global_worker.actors.values()), None)  # a worker process has one
    serve_replica = getattr(actor, "_replica_impl", None)
    if not hasattr(serve_replica, "_shutting_down"):
        log.warning("this Ray Serve does not tell its replicas that they stop")
        await asyncio.Event().wait()
    while not serve_replica._shutting_down:  # type: ignore[union-attr]
        await asyncio.sleep(LOOK_PERIOD_S)
