"""The gateway's metrics and its access log, from request contexts. Names and labels: `serve/metrics.py`."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.types import Scope

from serve.errors import CODES, InvalidRequest, TandemError, Unavailable
from serve.gateway.context import RequestContext
from serve.gateway.errors import (
    BodyTooLarge,
    ClientGone,
    ClientTooSlow,
    HeadersTooLarge,
    HostNotAllowed,
    MethodNotAllowed,
    RouteNotFound,
    Unauthorized,
)
from serve.gateway.promises import availability
from serve.gateway.tracing import GatewayTracing
from serve.metrics import UNKNOWN_MODEL
from serve.recorder import Recorder

log = logging.getLogger(__name__)

_REASONS: dict[type[TandemError], str] = {
    Unauthorized: "unauthorized",
    HostNotAllowed: "unauthorized",
    RouteNotFound: "not_found",
    MethodNotAllowed: "not_found",
    BodyTooLarge: "too_large",
    HeadersTooLarge: "too_large",
    ClientTooSlow: "too_slow",
}
_GENERATING = ("chat", "completions", "images")


class Telemetry:
    """Writes to one recorder, and spans where there is somebody to make them."""

    def __init__(self, recorder: Recorder, tracing: GatewayTracing | None = None) -> None:
        self.recorder = recorder
        self._tracing = tracing

    def began(self, context: RequestContext, scope: Scope) -> None:
        """The request's head is there."""
        if self._tracing is not None:
            self._tracing.began(context, scope["method"], scope["path"], dict(scope["headers"]))

    def asked(self, context: RequestContext, body: Any) -> None:
        """What a request that generates asks for is read and well-formed."""
        if self._tracing is not None:
            self._tracing.asked(context, body)

    def ended(self, context: RequestContext, status: int) -> None:
        """The answer is out, or nobody waits for it any more."""
        if context.endpoint is None:
            return
        error = context.error
        if self._tracing is not None and context.span is not None:
            self._tracing.ended(context, status)
        model = self._model(context)
        recorder = self.recorder
        outcome = outcome_of(error)
        recorder.count("tandem_requests_total", model=model, endpoint=context.endpoint, outcome=outcome)
        recorder.count("tandem_tenant_requests_total", model=model, tenant=context.tenant_name, outcome=outcome)
        if context.endpoint in _GENERATING and context.model is not None:
            availability(recorder, model, error)
        if isinstance(error, ClientGone):
            if context.is_accepted:
                recorder.count("tandem_cancellations_total", model=model)
        elif error is not None and not context.is_accepted:
            recorder.count("tandem_rejections_total", model=model, reason=_reason(error))
        if error is None and context.endpoint in _GENERATING:
            recorder.observe("tandem_e2e_request_latency_seconds", time.perf_counter() - context.started, model=model)

    def refused_connection(self) -> None:
        self.recorder.count("tandem_rejections_total", model=UNKNOWN_MODEL, reason="too_many_connections")

    def _model(self, context: RequestContext) -> str:
        if context.model is None:
            return UNKNOWN_MODEL
        self.recorder.admit(context.model)
        return context.model


def log_request(context: RequestContext, method: str, path: str, status: int) -> None:
    """One line a request. `path` is a route of ours, never what the client sent. No prompt text, no keys."""
    level = logging.INFO if context.endpoint is not None else logging.DEBUG
    if not log.isEnabledFor(level):
        return
    parts = [f"request id={context.request_id} method={method} path={path} status={status}"]
    if context.model is not None:
        parts.append(f"model={context.model}")
    for name, value in context.figures.items():
        parts.append(f"{name}={value:.4f}" if name.endswith("_s") else f"{name}={value}")
    parts.append(f"e2e_s={time.perf_counter() - context.started:.4f}")
    if context.error is not None:
        parts.append(f"error={_code(context.error)}")
    log.log(level, " ".join(parts))


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, TandemError) else "internal_error"


def outcome_of(error: BaseException | None) -> str:
    """One of `OUTCOMES`."""
    if error is None:
        return "success"
    if isinstance(error, ClientGone):
        return "cancelled"
    if isinstance(error, InvalidRequest):
        return "invalid"
    if isinstance(error, Unavailable):
        return "unavailable"
    return "deadline" if _code(error) == "deadline_exceeded" else "failed"


def _reason(error: BaseException) -> str:
    if isinstance(error, TandemError) and type(error) in _REASONS:
        return _REASONS[type(error)]
    if _code(error) in CODES:
        return _code(error)
    return "invalid_request" if isinstance(error, InvalidRequest) else "internal_error"
