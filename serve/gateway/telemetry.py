"""The gateway's metrics and its access log, from request contexts. Names and labels: `serve/metrics.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from serve.errors import CODES, InvalidRequest, TandemError, Unavailable
from serve.gateway.choices import Piece
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
from serve.gateway.generation import Tokens
from serve.metrics import UNKNOWN_MODEL, Recorder

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
_GENERATING = ("chat", "completions")


class Telemetry:
    """Writes to one recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def accepted(self, context: RequestContext, num_prompt_tokens: int) -> None:
        """Every backend request of this HTTP request was accepted."""
        context.is_accepted = True
        context.num_prompt_tokens = num_prompt_tokens
        model = self._model(context)
        self._recorder.count("tandem_prompt_tokens_total", num_prompt_tokens, model=model)
        self._recorder.observe("tandem_request_prompt_tokens", num_prompt_tokens, model=model)

    def stopwatch(self, context: RequestContext) -> Stopwatch:
        return Stopwatch(self._recorder, context, self._model(context))

    def ended(self, context: RequestContext, error: BaseException | None) -> None:
        """The answer is out, or nobody waits for it any more."""
        if context.endpoint is None:
            return
        model = self._model(context)
        recorder = self._recorder
        recorder.count("tandem_requests_total", model=model, endpoint=context.endpoint, outcome=_outcome(error))
        if isinstance(error, ClientGone):
            if context.is_accepted:
                recorder.count("tandem_cancellations_total", model=model)
        elif error is not None and not context.is_accepted:
            recorder.count("tandem_rejections_total", model=model, reason=_reason(error))
        if error is None and context.endpoint in _GENERATING:
            recorder.observe("tandem_e2e_request_latency_seconds", time.perf_counter() - context.started, model=model)

    def refused_connection(self) -> None:
        self._recorder.count("tandem_rejections_total", model=UNKNOWN_MODEL, reason="too_many_connections")

    def _model(self, context: RequestContext) -> str:
        if context.model is None:
            return UNKNOWN_MODEL
        self._recorder.admit(context.model)
        return context.model


class Stopwatch:
    """Token times of one request, all choices."""

    def __init__(self, recorder: Recorder, context: RequestContext, model: str) -> None:
        self._recorder = recorder
        self._context = context
        self._model = model
        self._itl = recorder.cell("tandem_inter_token_latency_seconds", model=model)
        self._last: dict[int, float] = {}
        self._num_seen = 0

    def saw(self, pieces: Sequence[Piece]) -> None:
        now = time.perf_counter()
        for piece in pieces:
            num_tokens = len(piece.token_ids)
            if not num_tokens:
                continue
            self._num_seen += num_tokens
            last = self._last.get(piece.index)
            self._last[piece.index] = now
            if last is not None:
                self._itl.observe((now - last) / num_tokens, num_tokens)
            elif self._context.first_token is None:
                self._context.first_token = now
                self._observe("tandem_time_to_first_token_seconds", now - self._context.started)

    def stop(self, tokens: Tokens) -> None:
        """Called once, however it ended."""
        self._context.num_output_tokens = tokens.completion
        self._recorder.count("tandem_output_tokens_total", tokens.completion, model=self._model)
        self._recorder.count("tandem_cached_tokens_total", tokens.cached, model=self._model)
        self._observe("tandem_request_output_tokens", tokens.completion)
        first = self._context.first_token
        if first is not None and self._num_seen > 1:
            per_token = (max(self._last.values()) - first) / (self._num_seen - 1)
            self._observe("tandem_request_time_per_output_token_seconds", per_token)

    def _observe(self, name: str, value: float) -> None:
        self._recorder.observe(name, value, model=self._model)


def log_request(context: RequestContext, method: str, path: str, status: int) -> None:
    """One line a request. `path` is a route of ours, never what the client sent. No prompt text, no keys."""
    level = logging.INFO if context.endpoint is not None else logging.DEBUG
    if not log.isEnabledFor(level):
        return
    parts = [f"request id={context.request_id} method={method} path={path} status={status}"]
    if context.model is not None:
        parts.append(f"model={context.model}")
    if context.num_prompt_tokens is not None:
        parts.append(f"prompt_tokens={context.num_prompt_tokens} output_tokens={context.num_output_tokens}")
    if context.first_token is not None:
        parts.append(f"ttft_s={context.first_token - context.started:.4f}")
    parts.append(f"e2e_s={time.perf_counter() - context.started:.4f}")
    if context.error is not None:
        parts.append(f"error={_code(context.error)}")
    log.log(level, " ".join(parts))


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, TandemError) else "internal_error"


def _outcome(error: BaseException | None) -> str:
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
