"""Where a process counts: the cells of its metrics, and what an engine's steps and jobs add to them.

prometheus-client's own cells keep their values private, and these travel to the hub; so the cells are here.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

import psutil

from serve.engine.interface import StepStats
from serve.engine.job import Job
from serve.events import FinishReason
from serve.metrics import METRICS, MODEL, UNKNOWN_MODEL, Metric, Role, Series, Snapshot
from serve.request import ModelCard
from serve.tracing import JobSpans

log = logging.getLogger(__name__)


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
        """Let `model` be a label from now on. Its counters start at zero, so that a rate sees the first event; so do
        its histograms that need no other label."""
        if model in self.models:
            return
        self.models.add(model)
        for metric in METRICS.values():
            is_histogram = metric.kind == "histogram" and metric.labels == MODEL
            if self._role in metric.roles and (is_histogram or metric.kind == "counter"):
                for labels in _combinations(metric, model):
                    self.cell(metric.name, **labels)

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
        self.set("tandem_model_load_seconds", card.load_s, model=card.name)

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


def _combinations(metric: Metric, model: str) -> Iterator[dict[str, str]]:
    """Every set of label values that `metric` can have for `model`; none where a label is not finite."""
    values = [(model,) if label == "model" else allowed or () for label, allowed in metric.labels.items()]
    return (dict(zip(metric.labels, chosen)) for chosen in itertools.product(*values))


class EngineObserver:
    """Counts what an engine does: the engine's `Observer`, for any modality. Runs on the engine's thread."""

    def __init__(self, recorder: Recorder, model: str, spans: JobSpans | None = None):
        """`spans`: who makes the spans of jobs that are traced."""
        recorder.admit(model)
        self._recorder = recorder
        self._model = model
        self._spans = spans
        self._step_seconds = recorder.cell("tandem_step_seconds", model=model)
        self._step_jobs = recorder.cell("tandem_step_jobs", model=model)
        self._step_tokens = recorder.cell("tandem_step_tokens", model=model)
        self._queue_time = recorder.cell("tandem_request_queue_time_seconds", model=model)
        self._prefill_time = recorder.cell("tandem_request_prefill_time_seconds", model=model)
        self._decode_time = recorder.cell("tandem_request_decode_time_seconds", model=model)
        self._engine_time = recorder.cell("tandem_request_engine_time_seconds", model=model)
        self._image_steps: dict[str, tuple[Cell, Cell, Cell]] = {}
        """Stage → seconds, rows, latent tokens."""
        self._canary_seconds = recorder.cell("tandem_canary_seconds", model=model)
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
        if self._spans is not None:
            self._spans.ended(job)
        if job.finish_reason is not None:
            self._ended[job.finish_reason].count()
        if job.first_scheduled is not None:
            self._queue_time.observe(job.first_scheduled - job.arrival)
        if job.finished is not None:
            self._engine_time.observe(job.finished - job.arrival)
            if job.first_scheduled is not None and job.first_output is not None:
                self._prefill_time.observe(job.first_output - job.first_scheduled)
                self._decode_time.observe(job.finished - job.first_output)
        if job.finish_reason is FinishReason.CANCELLED and job.cancelled is not None and job.finished is not None:
            self._cancel_to_free.observe(job.finished - job.cancelled)

    def on_canary(self, duration_s: float) -> None:
        self._canary_seconds.observe(duration_s)
