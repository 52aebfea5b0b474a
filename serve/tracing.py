"""Traces, by OpenTelemetry (extra `otel`): off unless its environment names a collector, and then not even imported.

    gateway   chat tandem-text             the HTTP request, from its head to its last byte
    gateway   └─ replica                   its time at one replica; after a loss the next one links to the one before
    replica      └─ job                    one choice or image
    replica         ├─ queue
    replica         ├─ prefill, decode     of text
    replica         └─ encode, denoise, …  of images, stage by stage; a preview is a decode in between

Where to send, what to sample and how to name the service are OpenTelemetry's own environment variables, as
`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_TRACES_SAMPLER` and `OTEL_SERVICE_NAME`. Spans travel as OTLP over HTTP. A request
takes the W3C's `traceparent` and `tracestate` along to its replica, and only if it is sampled: the times of a job's
life exist anyway, and a job without `traceparent` leaves no trace. Spans never hold what was asked or answered.

Here is what gateways and replicas share, and the replica's side; the gateway's is `serve/gateway/tracing.py`. Names are
those of OpenTelemetry's conventions for generative AI, our own begin with `tandem.`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serve.engine.job import Job
from serve.events import FinishReason

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
CLOSE_S = 3.0
"""For the last spans to leave, when a process ends; a collector that does not answer holds up nobody."""
_TRAITS = ("num_prompt", "num_cached", "num_output", "num_drafted", "num_accepted", "width", "height", "num_steps")
"""What a job's span tells of it, where it has that: `tandem.num_prompt`, ..."""


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether spans are to be sent somewhere."""
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not is_off and environment.get("OTEL_TRACES_EXPORTER") != "none" and any(map(environment.get, ENDPOINTS))


def start_tracing(process: str) -> Tracing | None:
    """What makes spans in this process; None, and nothing imported, when they are not wanted."""
    if not is_wanted():
        return None
    try:
        return Tracing(process)
    except ImportError as error:  # the variables may be meant for other programs: no reason not to serve
        log.warning("no traces: %s; pip install 'tandem-serve[otel]'", error)
        return None


class Tracing:
    """Makes and sends spans. Any thread. Raises ImportError where OpenTelemetry is not installed."""

    def __init__(self, process: str) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "tandem"}
        self._provider = TracerProvider(resource=Resource.create({**named, "service.instance.id": process}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("tandem")
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self,
        name: str,
        *,
        parent: Any,
        kind: str = "INTERNAL",
        start_ns: int | None = None,
        follows: Any = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> Any:
        """A span. `parent`: from `received` or `inside`; `start_ns`: since 1970, None is now; `follows`: a span whose
        work this one goes on with."""
        links = () if follows is None else (self._trace.Link(follows.get_span_context()),)
        span_kind = self._trace.SpanKind[kind]
        return self._tracer.start_span(name, parent, span_kind, attributes, links, start_time=start_ns)

    def received(self, traceparent: str, tracestate: str) -> Any:
        """The parent that another process names; without one, or with one that is malformed, a new trace begins."""
        carrier = {"traceparent": traceparent, "tracestate": tracestate}
        return self._propagator.extract({name: value for name, value in carrier.items() if value}, context=_nothing())

    def inside(self, span: Any) -> Any:
        """`span` as a parent."""
        return self._trace.set_span_in_context(span, _nothing())

    def sent(self, span: Any) -> tuple[str, str]:
        """What another process is to be told: `traceparent` and `tracestate`; both empty for a span not sampled."""
        carrier: dict[str, str] = {}
        if span.is_recording():
            self._propagator.inject(carrier, context=self.inside(span))
        return carrier.get("traceparent", ""), carrier.get("tracestate", "")

    def fail(self, span: Any, kind: str) -> None:
        """Mark the span as failed. `kind`: an error's code."""
        span.set_attribute("error.type", kind)
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))

    def close(self) -> None:
        """Send what is left, for `CLOSE_S` at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _nothing() -> Any:
    """A context of its own: what a library may have put into the current one is none of ours."""
    from opentelemetry.context import Context

    return Context()


class JobSpans:
    """Makes the spans of jobs that have ended, beside the engine's thread."""

    def __init__(self, tracing: Tracing, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: the engine's."""
        self._tracing = tracing
        self._model = model
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "job-spans")

    def ended(self, job: Job) -> None:
        """On the engine's thread, once a job. Costs a look at the job where it is not traced."""
        if job.traceparent:
            self._thread.submit(self._tell, job)

    def close(self) -> None:
        self._thread.shutdown()
        self._tracing.close()

    def _tell(self, job: Job) -> None:
        try:
            self._spans(job)
        except Exception:
            log.exception("job not traced id=%s", job.id)

    def _spans(self, job: Job) -> None:
        tracing, reason = self._tracing, job.finish_reason
        assert job.finished is not None and reason is not None
        told = {f"tandem.{name}": getattr(job, name) for name in _TRAITS if hasattr(job, name)}
        told |= {"gen_ai.request.model": self._model, "tandem.job.id": job.id, "tandem.finish_reason": reason.value}
        zero_ns = time.time_ns() - _ns(self._clock())
        parent = tracing.received(job.traceparent, job.tracestate)
        start_ns = zero_ns + _ns(job.arrival)
        whole = tracing.begin("job", parent=parent, kind="SERVER", start_ns=start_ns, attributes=told)
        if reason in (FinishReason.ERROR, FinishReason.DEADLINE):
            tracing.fail(whole, reason.value)
        for name, start, end in phases(job):
            part = tracing.begin(name, parent=tracing.inside(whole), start_ns=zero_ns + _ns(start))
            part.end(zero_ns + _ns(end))
        whole.end(zero_ns + _ns(job.finished))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def phases(job: Job) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of what a job went through, each beginning where the one before ended."""
    assert job.finished is not None
    marks = [("queue", job.arrival)]
    if job.stages:
        marks += job.stages
    elif job.first_scheduled is not None:
        marks.append(("prefill", job.first_scheduled))
        if job.first_output is not None:
            marks.append(("decode", job.first_output))
    ends = [start for _, start in marks[1:]] + [job.finished]
    for (name, start), end in zip(marks, ends):
        yield name, start, end
