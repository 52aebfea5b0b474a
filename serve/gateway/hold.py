"""Requests for a model that has no replica and gets one when somebody asks: they wait here, and are what wakes it.

A model that scales to zero is known by its config alone until its first replica has told this gateway what it serves;
after that by what is remembered of it. In both cases a request waits for a replica, `wake_timeout_s` at most, and while
any waits the model is being woken: on Ray by a call to its deployment, which Serve queues and counts as demand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.errors import Unavailable
from serve.options import ModelOptions

log = logging.getLogger(__name__)

Wake = Callable[[str], Awaitable[None]]
"""Given a model's name: ask for a replica. Returns when there is one; cancelled when nobody waits any more."""
WAKE_AGAIN_S = 1.0
"""Before the next call, when one has failed or has brought a replica that has not reached this gateway yet."""


@dataclass(frozen=True, slots=True)
class Sleeper:
    """A model that may have no replica."""

    name: str
    aliases: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases


def sleepers(models: Iterable[ModelOptions]) -> tuple[Sleeper, ...]:
    """Those of the models that scale to zero."""
    return tuple(
        Sleeper(model.name, model.served_model_name[1:])
        for model in models
        if model.autoscaling_config is not None and model.autoscaling_config.min_replicas == 0
    )


class Hold:
    """One per gateway, on its event loop."""

    def __init__(self, models: Iterable[Sleeper] = (), wake: Wake | None = None, *, timeout_s: float = 300.0):
        self.models = {model.name: model for model in models}
        self._wake = wake
        self._timeout_s = timeout_s
        self._num_held = dict.fromkeys(self.models, 0)
        self._calls: dict[str, asyncio.Task[None]] = {}

    def num_held(self, model: str) -> int:
        """Requests that wait for its first replica."""
        return self._num_held[model]

    def find(self, name: str | None) -> Sleeper | None:
        """The sleeper of that name or alias; without a name the only one."""
        if name is None:
            return next(iter(self.models.values())) if len(self.models) == 1 else None
        return next((model for model in self.models.values() if name in model.names), None)

    async def wait(
        self,
        model: str,
        is_up: Callable[[], asyncio.Event | None],
        timeout_s: float,
        return_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Wake `model` and return when it is up. `is_up` gives None then, else what is set when that may have changed.

        Raises Unavailable after `wake_timeout_s`, or after `timeout_s`, which is the request's own; `return_s` tells
        when to come back.
        """
        if is_up() is None:
            return
        limit_s = min(timeout_s, self._timeout_s)
        with self.waking(model):
            try:
                async with asyncio.timeout(limit_s):
                    while (changed := is_up()) is not None:
                        await changed.wait()
            except TimeoutError:
                raise Unavailable(
                    f"no replica of {model!r} came up within {limit_s:g} s; try again, it may be loading still",
                    retry_after_s=return_s(),
                ) from None

    @contextmanager
    def waking(self, model: str) -> Iterator[None]:
        """Around a wait for a replica of `model`. Nothing happens for a model that never sleeps."""
        if model not in self.models:
            yield
            return
        self._num_held[model] += 1
        if self._wake is not None and model not in self._calls:
            self._calls[model] = asyncio.create_task(self._keep_waking(self._wake, model))
        try:
            yield
        finally:
            self._num_held[model] -= 1
            if not self._num_held[model] and (call := self._calls.pop(model, None)) is not None:
                call.cancel()

    def close(self) -> None:
        """End the calls that are open."""
        for call in self._calls.values():
            call.cancel()

    async def _keep_waking(self, wake: Wake, model: str) -> None:
        log.info("waking model=%s", model)
        while True:
            try:
                await wake(model)
            except Exception as error:
                log.warning("not woken model=%s error=%r", model, error)
            await asyncio.sleep(WAKE_AGAIN_S)
