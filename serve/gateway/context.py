"""What the gateway knows about one HTTP request while it is answered: id, caller, clock, numbers for log and metrics.

The middleware makes it, the handlers fill it in, the middleware reads it at the end. It travels in the ASGI scope.
"""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from serve.gateway.auth import NO_KEY

_KEY = "tandem.context"


@dataclass(slots=True, eq=False)
class RequestContext:
    """One HTTP request. Times are `time.perf_counter` seconds."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    tenant: str = ""
    """A hash of the caller's API key; empty without keys."""
    tenant_name: str = NO_KEY
    """Metric label: the name that the key was given."""
    endpoint: str | None = None
    """Metric label; None for routes that are not counted (health, docs)."""
    model: str | None = None
    """The served model's own name, once it is known."""
    is_accepted: bool = False
    response_id: str = ""
    """As the answer tells it."""
    finish_reasons: tuple[str, ...] = ()
    """Of its choices, as far as they have ended."""
    span: Any = None
    """The span of this request, where it is traced."""
    traceparent: str = ""
    tracestate: str = ""
    """The same for replicas; empty where it is not traced, or not sampled."""
    figures: dict[str, float] = field(default_factory=dict)
    """What the log tells of the work, by name; times end in _s."""
    error: BaseException | None = None
    """Why it failed, when it did; also for failures after the 200."""


def bind(scope: MutableMapping[str, Any], context: RequestContext) -> None:
    scope[_KEY] = context


def of(scope: MutableMapping[str, Any]) -> RequestContext:
    """The context of a request. The middleware has set it for every HTTP request."""
    context: RequestContext = scope[_KEY]
    return context
