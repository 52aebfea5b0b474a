"""Metrics: one table of everything that is measured, and the plain values in which a process hands its own on.

`METRICS` is the only place where a metric is named; documentation, dashboards and tests read it. A process counts in
its `Recorder` (`serve/recorder.py`) and pushes `Snapshot`s (cumulative, plain values) to the hub (`serve/hub.py`),
which renders those of all processes (`serve/exposition.py`): every series carries `process`, so that a scrape gives the
same answer at every gateway. Labels are bounded: a finite label takes only the values the table lists, `model` only
names that are served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from serve.errors import CODES
from serve.events import FinishReason

Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["gateway", "replica", "hub"]
Labels = Mapping[str, tuple[str, ...] | None]

ENDPOINTS = ("chat", "completions", "tokenize", "detokenize", "models", "images")
OUTCOMES = ("success", "invalid", "unavailable", "deadline", "cancelled", "failed")
REASONS = (*CODES, "unauthorized", "not_found", "too_large", "too_slow", "rate_limited", "too_many_connections")
"""Why a request was not accepted: an error's code, or what the HTTP edge found."""

OBJECTIVES = ("availability", "ttft", "tpot", "image_deadline")
"""What a model promises (`serve/gateway/promises.py`)."""

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
        _gateway(
            "tandem_image_pixel_steps_total", "counter", "Width times height times denoise steps of images, as above."
        ),
        _gateway(
            "tandem_slo_requests_total", "counter", "Requests that met or missed an objective of their model.",
            labels={"model": None, "objective": OBJECTIVES, "verdict": ("met", "missed")},
        ),
        _gateway(
            "tandem_tenant_requests_total", "counter", "Requests that ended, by the name of the caller's key.",
            labels={"model": None, "tenant": None, "outcome": OUTCOMES},
        ),
        _gateway(
            "tandem_tenant_tokens_total", "counter", "Prompt and generated tokens, by the name of the caller's key.",
            labels={"model": None, "tenant": None, "direction": ("input", "output")},
        ),
        _gateway(
            "tandem_tenant_images_total", "counter", "Finished images, by the name of the caller's key.",
            labels={"model": None, "tenant": None},
        ),
        _gateway("tandem_requests_held", "gauge", "Requests that wait for a first replica of a model that sleeps."),
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
            "tandem_request_prefill_time_seconds", "histogram",
            "From a job's first step to its first output: a prompt's prefill, an image's encoding and first step.",
            LATENCY_S,
        ),
        _replica(
            "tandem_request_decode_time_seconds", "histogram", "From a job's first output to its end.", LATENCY_S
        ),
        _replica(
            "tandem_request_engine_time_seconds", "histogram", "From a job's acceptance to its end.", LATENCY_S
        ),
        _replica(
            "tandem_cancel_to_free_seconds", "histogram",
            "From a cancellation to the end of the job in the engine.", LATENCY_S,
        ),
        _replica("tandem_step_seconds", "histogram", "An engine step, from submit to settled.", LATENCY_S),
        _replica("tandem_canary_seconds", "histogram", "A proof that an idle engine still computes.", LATENCY_S),
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
        _replica("tandem_model_load_seconds", "gauge", "From the start of the replica's process to ready."),
        Metric("tandem_replicas", "gauge", ("hub",), MODEL, "Replicas that are registered and reachable."),
        Metric("tandem_replicas_desired", "gauge", ("hub",), MODEL, "Replicas asked for, of a model that scales."),
        Metric(
            "tandem_scaling_events_total", "counter", ("hub",), {"model": None, "direction": ("up", "down")},
            "Changes of the number of replicas asked for.",
        ),
        Metric(
            "tandem_replica_starts_total", "counter", ("hub",), MODEL, "Replica processes that began to come up."
        ),
        Metric(
            "tandem_snapshot_age_seconds", "gauge", ("hub",), {}, "Since the process last pushed; it does each second."
        ),
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
