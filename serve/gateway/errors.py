"""The one place that knows HTTP statuses: every error of `serve/errors.py`, and those only HTTP can have, as an answer.

Bodies are OpenAI's: `{"error": {"message", "type", "param", "code"}}`. `code` is the error's own and never changes.
Temporary refusals say when to come back. What is no TandemError becomes a 500 that says nothing of its cause.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import msgspec

from serve.errors import (
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineDead,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Quarantined,
    ReplicaLost,
    RequestFailed,
    TandemError,
    Unavailable,
)

MIN_RETRY_S = 1.0
"""Sooner is hammering."""
SPREAD = 0.25
"""Of what is told, at random on top."""


class Unauthorized(InvalidRequest):
    """No API key, or one that is not known."""

    code = "invalid_api_key"


class HostNotAllowed(InvalidRequest):
    """A server without keys, bound to loopback, was called by another name (DNS rebinding)."""

    code = "host_not_allowed"


class RouteNotFound(InvalidRequest):
    """There is nothing at this path."""

    code = "route_not_found"


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not."""

    code = "method_not_allowed"


class ClientTooSlow(InvalidRequest):
    """The request's head or body took longer than allowed."""

    code = "request_timeout"


class BodyTooLarge(InvalidRequest):
    """The body exceeds `max_body_bytes`."""

    code = "body_too_large"


class UnsupportedMediaType(InvalidRequest):
    """The body is not plain `application/json`."""

    code = "unsupported_media_type"


class HeadersTooLarge(InvalidRequest):
    """The request's head exceeds `max_header_bytes` or `max_headers`."""

    code = "headers_too_large"


class ClientGone(TandemError):
    """The client closed its connection; nobody reads the answer. Appears in logs and metrics only."""

    code = "client_gone"


@dataclass(frozen=True, slots=True)
class _Status:
    status: int
    type: str
    retry_after_s: float | None = None
    """Sent when the error itself names no time."""
    headers: tuple[tuple[str, str], ...] = ()


_CLOSE = (("connection", "close"),)

STATUS: dict[type[TandemError], _Status] = {
    InvalidRequest: _Status(400, "invalid_request_error"),
    ContextTooLong: _Status(400, "invalid_request_error"),
    Unauthorized: _Status(401, "authentication_error", headers=(("www-authenticate", "Bearer"),)),
    HostNotAllowed: _Status(403, "permission_error"),
    ModelNotFound: _Status(404, "not_found_error"),
    RouteNotFound: _Status(404, "not_found_error"),
    MethodNotAllowed: _Status(405, "invalid_request_error"),
    ClientTooSlow: _Status(408, "timeout_error", headers=_CLOSE),
    BodyTooLarge: _Status(413, "invalid_request_error", headers=_CLOSE),
    UnsupportedMediaType: _Status(415, "invalid_request_error"),
    Overloaded: _Status(429, "overloaded_error", retry_after_s=1.0),
    HeadersTooLarge: _Status(431, "invalid_request_error", headers=_CLOSE),
    ClientGone: _Status(499, "client_gone"),
    RequestFailed: _Status(500, "server_error"),
    Quarantined: _Status(500, "server_error", headers=(("x-should-retry", "false"),)),
    TandemError: _Status(500, "server_error"),
    Unavailable: _Status(503, "service_unavailable_error", retry_after_s=2.0),
    Draining: _Status(503, "service_unavailable_error", retry_after_s=5.0, headers=_CLOSE),
    ReplicaLost: _Status(503, "service_unavailable_error", retry_after_s=2.0),
    EngineDead: _Status(503, "service_unavailable_error", retry_after_s=5.0),
    DeadlineExceeded: _Status(504, "timeout_error"),
}
"""Looked up along the class's bases, so a new leaf of the tree answers like its parent until it is listed here."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An error as it goes out."""

    status: int
    code: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = field(default=())


def answer(error: BaseException) -> Answer:
    """The HTTP answer for any exception."""
    known = error if isinstance(error, TandemError) else TandemError("the server failed on this request; it is logged")
    status = _status_of(known)
    headers = status.headers
    if status.retry_after_s is not None:
        computed = known.retry_after_s
        headers = (*headers, *_retry_after(status.retry_after_s if computed is None else computed))
    return Answer(status.status, known.code, msgspec.json.encode(_payload(known, status.type)), headers)


def _retry_after(wait_s: float) -> tuple[tuple[str, str], ...]:
    """Spread over what follows, a second at least: who was told the same does not come back together. In whole seconds
    as HTTP has it, and in milliseconds for the clients that read those (OpenAI's)."""
    told_s = max(MIN_RETRY_S, wait_s) + random.uniform(0.0, max(1.0, SPREAD * wait_s))
    return ("retry-after", str(math.ceil(told_s))), ("retry-after-ms", str(math.ceil(1000 * told_s)))


def error_event(error: BaseException, name: str | None = None) -> bytes:
    """The same error as the last event of a stream that has already begun. `name`: of streams whose events have one."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + answer(error).body + b"\n\n"


def _status_of(error: TandemError) -> _Status:
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def _payload(error: TandemError, kind: str) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
