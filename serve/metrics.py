"""Metrics: one table of everything that is measured, the cells of one process, and their exposition.

`METRICS` is the only place where a metric is named; documentation, dashboards and tests read it. A process counts in
its `Recorder` and pushes `Snapshot`s (cumulative, plain values) to the hub (`serve/hub.py`), which renders those of
all processes: every series carries `process`, so that a scrape gives the same answer at every gateway.

prometheus-client formats the text. Its own cells keep their values private, and these travel; so the cells are here.
Labels are bounded: a finite label takes only the values the table lists, `model` only names that are served.
"""

from __future__ import annotations

import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import psutil
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from serve.engine.interface import StepStats
from serve.engine.job import Job
from serve.errors import CODES
from serve.events import FinishReason
from serve.request import ModelCard

log = logging.getLogger(__name__)

Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["gateway", "replica", "hub"]
Labels = Mapping[str, tuple[str, ...] | None]

ENDPOINTS = ("chat", "completions", "tokenize", "detokenize", "models", "images")
OUTCOMES = ("success", "invalid", "unavailable", "deadline", "cancelled", "failed")
REASONS = (*CODES, "unauthorized", "not_found", "too_large", "too_slow", "rate_limited", "too_many_connections")
"""Why a request was not accepted: an error's code, or what the HTTP edge found."""

UNKNOWN_MODEL = "unknown"
"""The `model` of requests that name none that is served."""
MODEL: Labels = {"model": None}
STAGE: Labels = {"model": None, "stage": ("encode", "denoise", "decode")}
"""Of an image step: text encoders, transformer, VAE."""
CARD: Labels = dict.fromkeys(
    ("model", "kind", "device", "dtype", "parameters", "max_model_len", "kv_cache_tokens", "threads")
)

POSITIONS = tuple(str(position) for position in range(1, 17))
"""Of a draft behind its row's known tokens; as many as `num_speculative_tokens` may be."""

LATENCY_S = tuple(float(f"{0.0005 * 10 ** (step / 4):.2g}") for step in range(25))
"""0.5 ms to 500 s, four a decade: small models answer in milliseconds, where vLLM's and SGLang's buckets are blind."""
TOKENS = tuple(float(2**power) for power in range(21))
JOBS = tuple(float(2**power) for power in range(13))


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. The unit is the end of its name (before `_total`)."""

    name: str
    kind: Kind
    roles: tuple[Role, ...]
    """The processes that record it."""
    labels: Labels
    """Label → its allowed values. None: what the process itself puts there, a served model's name above all."""
    help: str
    buckets: tuple[float, ...] = ()


def _gateway(name: str, kind: Kind, text: str, buckets: tuple[float, ...] = (), labels: Labels = MODEL) -> Metric:
    return Metric(name, kind, ("gateway",), labels, text, buckets)


def _replica(name: str, kind: Kind, text: str, buckets: tuple[float, ...] = (), labels: Labels = MODEL) -> Metric:
    return Metric(name, kind, ("replica",), labels, text, buckets)


def _process(name: str, text: str, labels: Labels) -> Metric:
    return Metric(name, "gauge", ("gateway", "replica", "hub"), labels, text)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _gateway(
            "tandem_requests_total", "counter", "Requests that ended, by how.",
            labels={"model": None, "endpoint": ENDPOINTS, "outcome": OUTCOMES},
        ),
        _gateway(
            "tandem_rejections_total", "counter", "Requests that were not accepted, by reason.",
            labels={"model": None, "reason": REASONS},
        ),
        _gateway("tandem_cancellations_total", "counter", "Accepted requests whose client left before the end."),
        _gateway("tandem_failovers_total", "counter", "Moves of accepted requests to another replica after a loss."),
        _gateway("tandem_quarantines_total", "counter", "Requests given up because two replicas were lost with them."),
        _gateway("tandem_prompt_tokens_total", "counter", "Prompt tokens of accepted requests."),
        _gateway("tandem_output_tokens_total", "counter", "Generated tokens."),
        _gateway("tandem_cached_tokens_total", "counter", "Prompt tokens found in a prefix cache."),
        _gateway("tandem_request_prompt_tokens", "histogram", "Prompt tokens of a request.", TOKENS),
        _gateway("tandem_request_output_tokens", "histogram", "Generated tokens of a request.", TOKENS),
        _gateway(
            "tandem_time_to_first_token_seconds", "histogram",
            "From the request's head to its first token, at the gateway.", LATENCY_S,
        ),
        _gateway(
            "tandem_inter_token_latency_seconds", "histogram",
            "Between two tokens of a choice; k tokens that come at once are k waits of a k-th.", LATENCY_S,
        ),
        _gateway(
            "tandem_request_time_per_output_token_seconds", "histogram",
            "(last token - first token) / (tokens - 1) of a request.", LATENCY_S,
        ),
        _gateway(
            "tandem_e2e_request_latency_seconds", "histogram",
            "From the request's head to its last byte, at the gateway.", LATENCY_S,
        ),
        _gateway(
            "tandem_images_total", "counter", "Images of accepted requests, by how they ended.",
            labels={"model": None, "outcome": OUTCOMES},
        ),
        _gateway("tandem_image_steps_total", "counter", "Denoise steps of images, unfinished ones too."),
        _gateway(
            "tandem_time_to_first_preview_seconds", "histogram",
            "From the request's head to its first preview of an image, at the gateway.", LATENCY_S,
        ),
        _gateway("tandem_http_requests_in_flight", "gauge", "HTTP requests being answered.", labels={}),
        _replica("tandem_requests_running", "gauge", "Jobs in the running batch."),
        _replica("tandem_requests_waiting", "gauge", "Accepted jobs that wait for their first or next step."),
        _replica("tandem_waiting_tokens", "gauge", "Work not yet started, in token positions."),
        _replica("tandem_predicted_backlog_seconds", "gauge", "How much longer than alone a newcomer takes here."),
        _replica(
            "tandem_jobs_total", "counter", "Jobs that ended in the engine, by reason.",
            labels={"model": None, "reason": tuple(reason.value for reason in FinishReason)},
        ),
        _replica(
            "tandem_request_queue_time_seconds", "histogram",
            "From acceptance to the first step that computes the job.", LATENCY_S,
        ),
        _replica(
            "tandem_cancel_to_free_seconds", "histogram",
            "From a cancellation to the end of the job in the engine.", LATENCY_S,
        ),
        _replica("tandem_step_seconds", "histogram", "An engine step, from submit to settled.", LATENCY_S),
        _replica("tandem_step_jobs", "histogram", "Jobs in a step: the batch size.", JOBS),
        _replica("tandem_step_tokens", "histogram", "Token positions computed in a step.", TOKENS),
        _replica("tandem_image_step_seconds", "histogram", "An engine step over images, by stage.", LATENCY_S, STAGE),
        _replica(
            "tandem_image_step_rows", "histogram", "Texts, latents to denoise (two when guided) or decode.", JOBS, STAGE
        ),
        _replica("tandem_image_step_tokens", "histogram", "Rows times latent tokens of a step.", TOKENS, STAGE),
        _replica("tandem_kv_cache_usage_ratio", "gauge", "Share of the KV cache held by unfinished jobs."),
        _replica("tandem_kv_cache_blocks", "gauge", "Blocks of the KV cache, all of them."),
        _replica("tandem_prefix_cache_queries_tokens_total", "counter", "Prompt tokens looked up."),
        _replica("tandem_prefix_cache_hits_tokens_total", "counter", "Prompt tokens found, so not computed again."),
        _replica("tandem_preemptions_total", "counter", "Running jobs put back to wait because memory ran out."),
        _replica("tandem_speculation_drafted_tokens_total", "counter", "Draft tokens that were verified."),
        _replica("tandem_speculation_accepted_tokens_total", "counter", "Draft tokens that held."),
        _replica(
            "tandem_speculation_accepted_at_position_tokens_total", "counter",
            "Draft tokens that held, by their place among a step's drafts.",
            labels={"model": None, "position": POSITIONS},
        ),
        _replica(
            "tandem_speculation_mean_accepted_tokens", "gauge", "Tokens a row with drafts gave, its own too, so far."
        ),
        _replica("tandem_speculation_draft_tokens", "gauge", "Drafts a row of the last step; 0 where they do not pay."),
        _replica("tandem_model_info", "gauge", "1; what a replica serves, in its labels.", labels=CARD),
        Metric("tandem_replicas", "gauge", ("hub",), MODEL, "Replicas that are registered and reachable."),
        _process("tandem_process_info", "1; what a process is.", {"role": ("gateway", "replica", "hub"), "pid": None}),
        _process("tandem_process_start_time_seconds", "Unix time at which the process started.", {}),
        _process("tandem_process_resident_memory_bytes", "Resident memory of the process.", {}),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """One metric with one set of label values. A histogram's values: observations per bucket, above them, their sum."""

    name: str
    labels: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything one process has counted since its start."""

    process: str
    series: tuple[Series, ...]


class Cell:
    """The values of one series. Bind it once where it is written often; a write costs well under a microsecond."""

    __slots__ = ("_buckets", "_lock", "values")

    def __init__(self, buckets: tuple[float, ...], lock: threading.Lock):
        self._buckets = buckets
        self._lock = lock
        self.values = [0.0] * (len(buckets) + 2 if buckets else 1)

    def count(self, value: float = 1.0) -> None:
        with self._lock:
            self.values[0] += value

    def set(self, value: float) -> None:
        self.values[0] = value

    def observe(self, value: float, times: int = 1) -> None:
        slot = bisect_left(self._buckets, value)
        with self._lock:
            self.values[slot] += times
            self.values[-1] += value * times


class Recorder:
    """Where one process counts. Any thread."""

    def __init__(self, process: str, role: Role):
        self.process = process
        self._role = role
        self.models = {UNKNOWN_MODEL}
        """The values that the label `model` may take here."""
        self._lock = threading.Lock()
        self._cells: dict[tuple[str, tuple[str, ...]], Cell] = {}
        self._followed: list[tuple[Cell, Callable[[], float]]] = []
        own = psutil.Process()
        self.set("tandem_process_info", 1, role=role, pid=str(os.getpid()))
        self.set("tandem_process_start_time_seconds", own.create_time())
        self.follow("tandem_process_resident_memory_bytes", lambda: float(own.memory_info().rss))

    def admit(self, model: str) -> None:
        """Let `model` be a label from now on. Its series that need no other label start at zero."""
        if model in self.models:
            return
        self.models.add(model)
        for metric in METRICS.values():
            if metric.kind != "gauge" and self._role in metric.roles and tuple(metric.labels) == ("model",):
                self.cell(metric.name, model=model)

    def cell(self, name: str, **labels: str) -> Cell:
        """The series' cell, made at its first use. Raises ValueError for a name or a label value outside the table."""
        metric = METRICS.get(name)
        if metric is None:
            raise ValueError(f"no metric is named {name!r}; add it to METRICS")
        if labels.keys() != metric.labels.keys():
            raise ValueError(f"{name} has the labels {[*metric.labels]}, not {[*labels]}")
        key = (name, tuple(labels[label] for label in metric.labels))
        cell = self._cells.get(key)
        if cell is None:
            self._check(metric, labels)
            with self._lock:
                cell = self._cells.setdefault(key, Cell(metric.buckets, self._lock))
        return cell

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        self.cell(name, **labels).count(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        self.cell(name, **labels).set(value)

    def observe(self, name: str, value: float, *, times: int = 1, **labels: str) -> None:
        self.cell(name, **labels).observe(value, times)

    def follow(self, name: str, read: Callable[[], float], **labels: str) -> None:
        """Take the value of a gauge, or the total of a counter, from `read` whenever a snapshot is made."""
        self._followed.append((self.cell(name, **labels), read))

    def describe(self, card: ModelCard) -> None:
        """Publish what this replica serves."""
        self.admit(card.name)
        self.set(
            "tandem_model_info", 1, model=card.name, kind=card.kind, device=card.device, dtype=card.dtype,
            parameters=str(card.num_parameters), max_model_len=str(card.max_model_len),
            kv_cache_tokens=str(card.kv_cache_tokens), threads=str(card.threads),
        )  # fmt: skip

    def snapshot(self) -> Snapshot:
        for cell, read in self._followed:
            try:
                cell.set(float(read()))
            except Exception:  # one reading must not cost all others; the value stays as it was
                log.exception("metric not read")
        with self._lock:
            series = [Series(name, labels, tuple(cell.values)) for (name, labels), cell in self._cells.items()]
        return Snapshot(self.process, tuple(series))

    def _check(self, metric: Metric, labels: Mapping[str, str]) -> None:
        if self._role not in metric.roles:
            raise ValueError(f"{metric.name} is recorded by {metric.roles}, not by a {self._role}")
        for label, value in labels.items():
            allowed = metric.labels[label]
            if allowed is not None and value not in allowed:
                raise ValueError(f"{metric.name}: {label} is {value!r}; it takes only {allowed}")
            if label == "model" and value not in self.models:
                raise ValueError(f"{metric.name}: no model {value!r} is served here")


class EngineObserver:
    """Counts what an engine does: the engine's `Observer`, for any modality. Runs on the engine's thread."""

    def __init__(self, recorder: Recorder, model: str):
        recorder.admit(model)
        self._recorder = recorder
        self._model = model
        self._step_seconds = recorder.cell("tandem_step_seconds", model=model)
        self._step_jobs = recorder.cell("tandem_step_jobs", model=model)
        self._step_tokens = recorder.cell("tandem_step_tokens", model=model)
        self._queue_time = recorder.cell("tandem_request_queue_time_seconds", model=model)
        self._image_steps: dict[str, tuple[Cell, Cell, Cell]] = {}
        """Stage → seconds, rows, latent tokens."""
        self._cancel_to_free = recorder.cell("tandem_cancel_to_free_seconds", model=model)
        self._ended = {
            reason: recorder.cell("tandem_jobs_total", model=model, reason=reason.value) for reason in FinishReason
        }

    def follow(self, name: str, read: Callable[[], float], **labels: str) -> None:
        """Take the metric `name` of this model from `read` (a scheduler's running total, say)."""
        self._recorder.follow(name, read, model=self._model, **labels)

    def on_step(self, stats: StepStats) -> None:
        self._step_seconds.observe(stats.duration_s)
        self._step_jobs.observe(stats.num_jobs)
        self._step_tokens.observe(stats.num_tokens)
        if stats.stage:
            self._on_image_step(stats)

    def _on_image_step(self, stats: StepStats) -> None:
        cells = self._image_steps.get(stats.stage)
        if cells is None:
            seconds, rows, tokens = (
                self._recorder.cell(f"tandem_image_step_{unit}", model=self._model, stage=stats.stage)
                for unit in ("seconds", "rows", "tokens")
            )
            cells = self._image_steps[stats.stage] = (seconds, rows, tokens)
        seconds, rows, tokens = cells
        seconds.observe(stats.duration_s)
        rows.observe(stats.num_rows)
        tokens.observe(stats.num_tokens)

    def on_finish(self, job: Job) -> None:
        if job.finish_reason is not None:
            self._ended[job.finish_reason].count()
        if job.first_scheduled is not None:
            self._queue_time.observe(job.first_scheduled - job.arrival)
        if job.finish_reason is FinishReason.CANCELLED and job.cancelled is not None and job.finished is not None:
            self._cancel_to_free.observe(job.finished - job.cancelled)


def render(snapshots: Iterable[Snapshot]) -> str:
    """The Prometheus text (version 0.0.4) of all processes' snapshots, each series labelled with its process."""
    registry = CollectorRegistry()
    registry.register(_Snapshots(tuple(snapshots)))
    return generate_latest(registry).decode()


class _Snapshots(Collector):
    """Snapshots as prometheus-client wants to read them."""

    def __init__(self, snapshots: tuple[Snapshot, ...]):
        self._snapshots = snapshots

    def collect(self) -> Iterable[Family]:
        families: dict[str, Family] = {}
        for snapshot in self._snapshots:
            for series in snapshot.series:
                metric = METRICS.get(series.name)
                if metric is None or not _fits(series, metric):
                    continue  # pushed by another version of Tandem
                if (family := families.get(metric.name)) is None:
                    family = Family(metric.name.removesuffix("_total"), metric.help, metric.kind)
                    families[metric.name] = family
                labels = {**dict(zip(metric.labels, series.labels)), "process": snapshot.process}
                _add(family, metric, labels, series.values)
        return families.values()


def _fits(series: Series, metric: Metric) -> bool:
    num_values = len(metric.buckets) + 2 if metric.buckets else 1
    return len(series.labels) == len(metric.labels) and len(series.values) == num_values


def _add(family: Family, metric: Metric, labels: dict[str, str], values: tuple[float, ...]) -> None:
    if metric.kind != "histogram":
        family.add_sample(metric.name, labels, values[0])
        return
    total = 0.0
    for bound, number in zip((*metric.buckets, float("inf")), values):
        total += number
        family.add_sample(f"{metric.name}_bucket", {**labels, "le": floatToGoString(bound)}, total)
    family.add_sample(f"{metric.name}_count", labels, total)
    family.add_sample(f"{metric.name}_sum", labels, values[-1])
