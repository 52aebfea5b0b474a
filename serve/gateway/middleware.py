"""What happens around every request, as pure ASGI: identity, log, metrics; then the gate; then the body.

Observe   request id, security headers, one log line, metrics; no exception gets past it
Gate      host name, key, drain: decided from the path and headers alone, before a byte of the body is read
Body      one JSON body, its type, its size and its time
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import Draining, InvalidRequest, TandemError
from serve.gateway import context as contexts
from serve.gateway.auth import Hosts, Keys
from serve.gateway.context import RequestContext
from serve.gateway.drain import Drain
from serve.gateway.errors import BodyTooLarge, ClientGone, ClientTooSlow, UnsupportedMediaType, answer
from serve.gateway.field import PATHS
from serve.gateway.telemetry import Telemetry, log_request
from serve.options import GatewayOptions

log = logging.getLogger(__name__)

ENDPOINTS = {
    **{path: endpoint for endpoint, path in PATHS.items()},
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
    "/v1/models": "models",
}
"""Path → metric label. These take a JSON body, the last one apart."""
PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Answered while the gateway drains."""
_KNOWN_PATHS = frozenset([*ENDPOINTS, *PROBES, "/", "/docs", "/openapi.json"])
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


class Observe:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry, drain: Drain) -> None:
        self._app = app
        self._telemetry = telemetry
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(request_id=_request_id(scope), endpoint=_endpoint(scope["path"]))
        contexts.bind(scope, context)
        self._telemetry.began(context, scope)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", context.request_id.encode()), *_SECURITY]
                present = {name for name, _ in message["headers"]}
                if b"cache-control" not in present:
                    extra.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            if context.endpoint is None:
                await self._app(scope, receive, send_with_headers)
            else:
                with self._drain.counted():
                    await self._app(scope, receive, send_with_headers)
        except Exception as error:
            context.error = error
            if not isinstance(error, TandemError):
                log.exception("request failed id=%s", context.request_id)
            if status == 0 and not isinstance(error, ClientGone):
                await send_error(error, send_with_headers)
        finally:
            self._telemetry.ended(context, status)
            shown = 499 if isinstance(context.error, ClientGone) else status
            log_request(context, scope["method"], _shown_path(scope["path"]), shown)


class Gate:
    """Refuses before anything is read. Raises; `Observe` answers."""

    def __init__(self, app: ASGIApp, *, keys: Keys, hosts: Hosts, drain: Drain) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            self._hosts.check(_header(scope, b"host"))
            context = contexts.of(scope)
            context.tenant = self._keys.tenant(path, _header(scope, b"authorization"))
            context.tenant_name = self._keys.name(context.tenant)
            if self._drain.is_active and path not in PROBES:
                raise Draining("the server is shutting down; send the request again to another one, or soon")
        await self._app(scope, receive, send)


class Body:
    """Reads the whole body of the JSON routes before they run, so that no route can forget a limit."""

    def __init__(self, app: ASGIApp, *, options: GatewayOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ENDPOINTS:
            await self._app(scope, receive, send)
            return
        self._check_headers(scope)
        body: bytes | None = await self._read(receive)

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, replay, send)

    def _check_headers(self, scope: Scope) -> None:
        encoding = _header(scope, b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in ("", "identity"):
            raise UnsupportedMediaType("compressed bodies are not accepted; send it without Content-Encoding")
        kind, _, parameters = (_header(scope, b"content-type") or "").partition(";")
        charset = parameters.strip().lower().replace('"', "")
        if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
            raise UnsupportedMediaType("send a JSON body with 'Content-Type: application/json'")
        length = _header(scope, b"content-length")
        if length is not None:
            if not re.fullmatch(r"[0-9]{1,19}", length):
                raise InvalidRequest("Content-Length is not a number")
            self._check_size(int(length))

    async def _read(self, receive: Receive) -> bytes:
        chunks = bytearray()
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone("the client closed the connection while sending")
                    chunks += message.get("body", b"")
                    self._check_size(len(chunks))
                    if not message.get("more_body", False):
                        return bytes(chunks)
        except TimeoutError:
            limit = self._options.body_timeout_s
            raise ClientTooSlow(f"the body did not arrive within {limit:g} s") from None

    def _check_size(self, num_bytes: int) -> None:
        limit = self._options.max_body_bytes
        if num_bytes > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes; send less, or raise max_body_bytes")


async def send_error(error: BaseException, send: Send) -> None:
    """The error's answer as ASGI messages."""
    failed = answer(error)
    headers: Iterable[tuple[str, str]] = (("content-type", "application/json"), *failed.headers)
    fields = [(name.encode(), value.encode()) for name, value in headers]
    fields.append((b"content-length", str(len(failed.body)).encode()))
    await send({"type": "http.response.start", "status": failed.status, "headers": fields})
    await send({"type": "http.response.body", "body": failed.body})


def _header(scope: Scope, name: bytes) -> str | None:
    found = [value for key, value in scope["headers"] if key == name]
    return b", ".join(found).decode("latin-1") if found else None


def _request_id(scope: Scope) -> str:
    """The caller's x-request-id when it is sane, else a new one."""
    given = _header(scope, b"x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _endpoint(path: str) -> str | None:
    return "models" if path.startswith("/v1/models/") else ENDPOINTS.get(path)


def _shown_path(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in _KNOWN_PATHS else "(unknown)"
