"""The gateway's spans: one of each request, and in it one of each replica that has it. Only made where tracing is on.

Attributes follow OpenTelemetry's conventions for generative AI (open-telemetry/semantic-conventions-genai) and for HTTP
servers. Images are `generate_content` with output type `image`: the conventions have no name of their own for
it. Stop strings, prompts and outputs are the client's, and in no span.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from serve.backend import EventStream
from serve.errors import Draining, EngineDead, ReplicaLost, TandemError
from serve.events import Event
from serve.gateway.context import RequestContext
from serve.gateway.errors import ClientGone
from serve.gateway.pool import Remote
from serve.request import Request
from serve.tracing import Tracing

PROVIDER = "tandem"
_OPERATIONS = {"chat": "chat", "completions": "text_completion", "images": "generate_content"}
_ASKED = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "model": "gen_ai.request.model",
    "num_inference_steps": "tandem.request.num_inference_steps",
    "guidance_scale": "tandem.request.guidance_scale",
}
"""Field of a body → attribute."""
_USED = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
    "ttft_s": "gen_ai.response.time_to_first_chunk",
    "images": "tandem.usage.images",
    "steps": "tandem.usage.denoise_steps",
    "first_preview_s": "tandem.response.time_to_first_preview",
}
"""Figure of the log → attribute."""
_LOSSES = (ReplicaLost, EngineDead, Draining)


class GatewayTracing:
    """The spans of one gateway. On its event loop."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._left: dict[str, dict[str, Any]] = {}
        """`traceparent` of a request's span → its backend requests that have lost a replica → the span of that one."""

    def began(self, context: RequestContext, method: str, route: str, headers: dict[bytes, bytes]) -> None:
        """A request's head is there. Only requests that generate are traced."""
        operation = _OPERATIONS.get(context.endpoint or "")
        if operation is None:
            return
        told = [headers.get(name, b"").decode("latin-1") for name in (b"traceparent", b"tracestate")]
        context.span = self._tracing.begin(
            operation,
            parent=self._tracing.received(*told),
            kind="SERVER",
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.output.type": "image" if operation == "generate_content" else "text",
                "http.request.method": method,
                "http.route": route,
                "url.path": route,
                "url.scheme": "http",
                "tandem.request.id": context.request_id,
            },
        )
        context.traceparent, context.tracestate = self._tracing.sent(context.span)

    def asked(self, context: RequestContext, body: Any) -> None:
        """The body is checked."""
        span = context.span
        given = {name: getattr(body, name, None) for name in _ASKED}
        for name, value in given.items():
            if value is not None:
                span.set_attribute(_ASKED[name], value)
        span.set_attribute("gen_ai.request.stream", bool(body.stream))
        if body.n is not None and body.n != 1:
            span.set_attribute("gen_ai.request.choice.count", body.n)
        if getattr(body, "response_format", None) is not None and given["num_inference_steps"] is None:
            span.set_attribute("gen_ai.output.type", "json")

    def ended(self, context: RequestContext, status: int) -> None:
        """The answer is out, or nobody waits for it. `status` 0: none was sent."""
        span = context.span
        self._left.pop(context.traceparent, None)
        if context.model is not None:
            span.update_name(f"{_OPERATIONS[context.endpoint or '']} {context.model}")
            span.set_attribute("gen_ai.response.model", context.model)
        for name, value in context.figures.items():
            if name in _USED:
                span.set_attribute(_USED[name], value)
        if context.response_id:
            span.set_attribute("gen_ai.response.id", context.response_id)
        if context.finish_reasons:
            span.set_attribute("gen_ai.response.finish_reasons", context.finish_reasons)
        if status:
            span.set_attribute("http.response.status_code", status)
        error = context.error
        if isinstance(error, ClientGone) or (error is not None and 400 <= status < 500):
            span.set_attribute("error.type", _kind(error))  # no fault of this side, so the span has not failed
        elif error is not None:
            self._tracing.fail(span, _kind(error))
        span.end()

    def placed(self, request: Request, replica_id: str) -> Any:
        """A span for `request` at that replica; it goes on with what the request's last one has left."""
        return self._tracing.begin(
            "replica",
            parent=self._tracing.received(request.traceparent, request.tracestate),
            kind="CLIENT",
            follows=self._left.get(request.traceparent, {}).pop(request.request_id, None),
            attributes={"tandem.replica.id": replica_id, "gen_ai.request.model": request.model},
        )

    def carried(self, request: Request, span: Any) -> Request:
        """`request` with `span` as its parent."""
        traceparent, tracestate = self._tracing.sent(span)
        return replace(request, traceparent=traceparent, tracestate=tracestate)

    def left(self, request: Request, span: Any, error: BaseException | None) -> None:
        """The replica has nothing more to do with `request`: done, refused, lost, or closed by this side."""
        if isinstance(error, _LOSSES):
            self._left.setdefault(request.traceparent, {})[request.request_id] = span
        if isinstance(error, Exception):
            self._tracing.fail(span, _kind(error))
        span.end()

    def close(self) -> None:
        self._tracing.close()


class TracedReplica:
    """A `Remote` that makes a span of each request it is given; in all else the one it is around."""

    def __init__(self, remote: Remote, tracing: GatewayTracing, replica_id: str) -> None:
        self._remote = remote
        self._tracing = tracing
        self._replica_id = replica_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    async def submit(self, request: Request) -> EventStream:
        if not request.traceparent:
            return await self._remote.submit(request)
        span = self._tracing.placed(request, self._replica_id)
        try:
            stream = await self._remote.submit(self._tracing.carried(request, span))
        except BaseException as error:
            self._tracing.left(request, span, error)
            raise
        return _TracedStream(stream, self._tracing, request, span)


class _TracedStream:
    """An `EventStream` that ends its span."""

    def __init__(self, stream: EventStream, tracing: GatewayTracing, request: Request, span: Any) -> None:
        self._stream = stream
        self._tracing = tracing
        self._request = request
        self._span = span
        self._has_ended = False

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> list[Event]:
        try:
            return await self._stream.__anext__()
        except StopAsyncIteration:
            self._end(None)
            raise
        except Exception as error:
            self._end(error)
            raise

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._tracing.left(self._request, self._span, error)


def _kind(error: BaseException) -> str:
    return error.code if isinstance(error, TandemError) else type(error).__name__
