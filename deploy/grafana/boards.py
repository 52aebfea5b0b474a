"""Tandem's Grafana boards. `python -m deploy.grafana.boards` writes `dashboards/*.json`; change boards here, not there.

A panel is a title, PromQL with its legend, and a unit; `panels.py` makes Grafana's JSON of it. Sums are over processes
unless a panel says which one.
"""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.panels import Board, Panel, dashboard

FOLDER = Path(__file__).resolve().parent / "dashboards"
WINDOW = "[$__rate_interval]"


def of(name: str, **labels: str) -> str:
    """The series of the chosen models; `labels` are matched exactly, or as =~ when they begin with ~."""
    matched = ['model=~"$model"', *(f'{key}="{value}"'.replace('="~', '=~"') for key, value in labels.items())]
    return name + "{" + ", ".join(matched) + "}"


def rate(name: str, by: str = "model", **labels: str) -> str:
    return f"sum by ({by}) (rate({of(name, **labels)}{WINDOW}))"


def mean(name: str, by: str = "model", **labels: str) -> str:
    """Of a histogram's observations; nothing where there were none."""
    return f"{rate(name + '_sum', by, **labels)} / ({rate(name + '_count', by, **labels)} > 0)"


def quantiles(name: str, by: str = "model", **labels: str) -> dict[str, str]:
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return {
        f"histogram_quantile({q}, {rate(name + '_bucket', f'{by}, le', **labels)})": f"{legend} p{q * 100:g}"
        for q in (0.5, 0.9, 0.99)
    }


def by_process(name: str) -> dict[str, str]:
    return {f"sum by (process) ({of(name)})": "{{process}}"}


def share(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


def heat(title: str, name: str, unit: str) -> Panel:
    increase = f"sum by (le) (increase({of(name + '_bucket')}{WINDOW}))"
    return Panel(title, {increase: "{{le}}"}, unit, kind="heatmap")


def in_time(window: str, **labels: str) -> str:
    """Share of requests that met their objective."""
    met, all_of_them = (of("tandem_slo_requests_total", **labels, **more) for more in ({"verdict": "met"}, {}))
    ratio = share(*(f"sum by (model, objective) (increase({series}[{window}]))" for series in (met, all_of_them)))
    return f"({ratio})"


TPOT = Panel("Time per output token", quantiles("tandem_request_time_per_output_token_seconds"), "s")
NOT_STARTED = Panel("Work not yet started", by_process("tandem_waiting_tokens"), "tokens")
LATENCY = Panel("Whole requests", quantiles("tandem_e2e_request_latency_seconds"), "s")
TTFT = Panel("Time to first token", quantiles("tandem_time_to_first_token_seconds"), "s")
OUTCOMES = Panel(
    "Requests by outcome", {rate("tandem_requests_total", "outcome"): "{{outcome}}"}, "reqps", stacked=True
)
QUEUE = Panel("Queue wait", quantiles("tandem_request_queue_time_seconds"), "s")
TOKENS = Panel(
    "Tokens",
    {
        rate("tandem_prompt_tokens_total"): "{{model}} prompt",
        rate("tandem_cached_tokens_total"): "{{model}} prompt, cached",
        rate("tandem_output_tokens_total"): "{{model}} output",
    },
    "tokens/s",
)
IMAGES = Panel(
    "Images by outcome", {rate("tandem_images_total", "model, outcome"): "{{model}} {{outcome}}"}, "images/s"
)
PIXELS = Panel(
    "Megapixel-steps",
    {f"{rate('tandem_image_pixel_steps_total')} / 1e6": "{{model}}"},
    "Mpx-steps/s",
    note="Width times height times steps: the one measure that compares mixed sizes.",
)
JOBS = Panel(
    "Running and waiting",
    {
        f"sum by (process) ({of('tandem_requests_running')})": "{{process}} running",
        f"sum by (process) ({of('tandem_requests_waiting')})": "{{process}} waiting",
    },
)
BACKLOG = Panel("Predicted backlog", by_process("tandem_predicted_backlog_seconds"), "s")
REPLICAS = Panel(
    "Replicas",
    {
        f"sum by (model) ({of('tandem_replicas')})": "{{model}}",
        f"sum by (model) ({of('tandem_replicas_desired')})": "{{model}} asked for",
    },
)
CANCELLED = Panel(
    "Left by their client",
    {rate("tandem_cancellations_total"): "{{model}}"},
    "reqps",
    note="Accepted requests whose client closed the connection.",
)
LOSSES = Panel(
    "Failovers and quarantines",
    {rate("tandem_failovers_total"): "{{model}} moved", rate("tandem_quarantines_total"): "{{model}} given up"},
    "reqps",
)

OVERVIEW = Board(
    "tandem-overview",
    "Tandem / Overview",
    {
        "Promises": (
            Panel("In time, in the shown range", {in_time("$__range"): "{{model}} {{objective}}"},
                  "percentunit", kind="stat", lines=(0.95, 0.99), falling=True),
            Panel("Error budget left, 30 days",
                  {f"1 - (1 - {in_time('30d')}) / on (objective) group_left () tandem:slo_budget:ratio":
                   "{{model}} {{objective}}"}, "percentunit", kind="bargauge", most=1, lines=(0.1, 0.5), falling=True),
            Panel("Burn rate",
                  {'tandem:slo_burn:rate1h{model=~"$model"}': "{{model}} {{objective}} 1 h",
                   'tandem:slo_burn:rate6h{model=~"$model"}': "{{model}} {{objective}} 6 h"},
                  lines=(1, 14.4), note="1 spends exactly the budget in 30 days; 14.4 over an hour pages."),
            Panel("Firing alerts", {'ALERTS{alertname=~"Tandem.*", alertstate="firing"}': ""}, kind="table", width=24),
        ),
        "Traffic": (
            OUTCOMES,
            Panel("Failing share",
                  {share(rate("tandem_requests_total", outcome="~failed|unavailable|deadline"),
                         rate("tandem_requests_total")): "{{model}}"}, "percentunit"),
            Panel("HTTP requests being answered", {"sum(tandem_http_requests_in_flight)": "all gateways"}),
            TOKENS, IMAGES, PIXELS,
        ),
        "Latency": (TTFT, TPOT, LATENCY),
        "Capacity": (REPLICAS, JOBS, LOSSES),
    },
)  # fmt: skip

TEXT = Board(
    "tandem-text",
    "Tandem / Text engine",
    {
        "Latency": (
            TTFT,
            Panel("Between two tokens", quantiles("tandem_inter_token_latency_seconds"), "s"),
            TPOT,
            heat("Time to first token, spread", "tandem_time_to_first_token_seconds", "s"),
            Panel("Where a first token's time goes",
                  {mean("tandem_request_queue_time_seconds"): "{{model}} queue",
                   mean("tandem_request_prefill_time_seconds"): "{{model}} prefill",
                   f"clamp_min({mean('tandem_time_to_first_token_seconds')}"
                   f" - {mean('tandem_request_queue_time_seconds')}"
                   f" - {mean('tandem_request_prefill_time_seconds')}, 0)": "{{model}} gateway and channel"},
                  "s", stacked=True, note="Means; a request for several choices counts once per choice in the engine."),
            Panel("Prefill and decode",
                  quantiles("tandem_request_prefill_time_seconds") | quantiles("tandem_request_decode_time_seconds")
                  | {mean("tandem_request_decode_time_seconds"): "{{model}} decode, mean"}, "s"),
        ),
        "Work": (
            TOKENS,
            heat("Prompt tokens of a request", "tandem_request_prompt_tokens", "short"),
            heat("Output tokens of a request", "tandem_request_output_tokens", "short"),
            Panel("Jobs by their end", {rate("tandem_jobs_total", "model, reason"): "{{model}} {{reason}}"}, "ops"),
            JOBS, QUEUE,
        ),
        "Steps": (
            Panel("Step time", quantiles("tandem_step_seconds"), "s"),
            Panel("Jobs in a step", {mean("tandem_step_jobs", "process"): "{{process}}"}, note="The batch size, mean."),
            Panel("Tokens in a step", {mean("tandem_step_tokens", "process"): "{{process}}"}),
            Panel("Steps", {rate("tandem_step_seconds_count", "process"): "{{process}}"}, "ops"),
            Panel("Share of the time in steps", {rate("tandem_step_seconds_sum", "process"): "{{process}}"},
                  "percentunit", note="Above 1 where steps overlap."),
            NOT_STARTED,
        ),
        "Memory": (
            Panel("KV cache in use", by_process("tandem_kv_cache_usage_ratio"), "percentunit", most=1, lines=(0.9,)),
            Panel("KV cache blocks", by_process("tandem_kv_cache_blocks")),
            Panel("Preemptions", {rate("tandem_preemptions_total", "process"): "{{process}}"}, "ops"),
            Panel("Prefix cache", {share(rate("tandem_prefix_cache_hits_tokens_total"),
                                         rate("tandem_prefix_cache_queries_tokens_total")): "{{model}}"},
                  "percentunit", most=1, note="Share of looked-up prompt tokens that were found."),
            Panel("Prefix cache by replica", {share(rate("tandem_prefix_cache_hits_tokens_total", "process"),
                                                    rate("tandem_prefix_cache_queries_tokens_total", "process")):
                                              "{{process}}"}, "percentunit", most=1),
            BACKLOG,
        ),
        "Speculation": (
            Panel("Drafts that held", {share(rate("tandem_speculation_accepted_tokens_total"),
                                             rate("tandem_speculation_drafted_tokens_total")): "{{model}}"},
                  "percentunit", most=1),
            Panel("Drafts that held, by position",
                  {rate("tandem_speculation_accepted_at_position_tokens_total", "position"): "{{position}}"},
                  "tokens/s"),
            Panel("Tokens of a row with drafts",
                  {f"max by (process) ({of('tandem_speculation_mean_accepted_tokens')})": "{{process}} mean, so far",
                   f"max by (process) ({of('tandem_speculation_draft_tokens')})": "{{process}} drafts now"}),
        ),
    },
)  # fmt: skip

IMAGE = Board(
    "tandem-image",
    "Tandem / Image engine",
    {
        "Requests": (
            IMAGES, PIXELS,
            Panel("Denoise steps", {rate("tandem_image_steps_total"): "{{model}}"}, "steps/s"),
            Panel("Whole requests", quantiles("tandem_e2e_request_latency_seconds"), "s",
                  note="Choose an image model above; this counts all endpoints."),
            Panel("Time to first preview", quantiles("tandem_time_to_first_preview_seconds"), "s"),
            Panel("In time", {in_time("5m", objective="image_deadline"): "{{model}}"}, "percentunit", most=1),
            QUEUE, CANCELLED, JOBS,
        ),
        "Steps": (
            Panel("Step time by stage", quantiles("tandem_image_step_seconds", "model, stage"), "s"),
            Panel("Rows in a step", {mean("tandem_image_step_rows", "model, stage"): "{{model}} {{stage}}"},
                  note="Batch occupancy, mean: texts, latents (two when guided), latents to decode."),
            Panel("Latent tokens in a step", {mean("tandem_image_step_tokens", "model, stage"): "{{model}} {{stage}}"}),
            Panel("Where the time goes", {rate("tandem_image_step_seconds_sum", "stage"): "{{stage}}"}, "percentunit",
                  stacked=True, note="Seconds of steps in a second, by stage."),
            Panel("Steps", {rate("tandem_image_step_seconds_count", "model, stage"): "{{model}} {{stage}}"}, "ops"),
            heat("Latent tokens in a step, spread", "tandem_image_step_tokens", "short"),
            NOT_STARTED,
            BACKLOG, LOSSES,
        ),
    },
)  # fmt: skip

GATEWAY = Board(
    "tandem-gateway",
    "Tandem / Gateway and tenants",
    {
        "Requests": (
            Panel("Requests by endpoint", {rate("tandem_requests_total", "endpoint"): "{{endpoint}}"}, "reqps",
                  stacked=True),
            OUTCOMES,
            Panel("Rejected by reason", {rate("tandem_rejections_total", "reason"): "{{reason}}"}, "reqps",
                  stacked=True),
            CANCELLED, LOSSES,
            Panel("From a cancellation to free memory", quantiles("tandem_cancel_to_free_seconds"), "s"),
        ),
        "The gateway's own part": (
            Panel("Gateway against engine",
                  {mean("tandem_request_engine_time_seconds"): "{{model}} engine",
                   f"clamp_min({mean('tandem_e2e_request_latency_seconds')} - "
                   f"{mean('tandem_request_engine_time_seconds')}, 0)": "{{model}} gateway, channel and client"},
                  "s", stacked=True, note="Means of whole requests. Slow readers count for the gateway's part."),
            Panel("HTTP requests being answered", {"sum by (process) (tandem_http_requests_in_flight)": "{{process}}"}),
            Panel("Requests by gateway", {rate("tandem_requests_total", "process"): "{{process}}"}, "reqps"),
        ),
        "Tenants": (
            Panel("Requests by tenant", {rate("tandem_tenant_requests_total", "tenant"): "{{tenant}}"}, "reqps",
                  stacked=True, note="By the names that keys were given; keys without one together."),
            Panel("Tokens by tenant",
                  {rate("tandem_tenant_tokens_total", "tenant, direction"): "{{tenant}} {{direction}}"}, "tokens/s"),
            Panel("Images by tenant", {rate("tandem_tenant_images_total", "tenant"): "{{tenant}}"}, "images/s"),
            Panel("Not answered, by tenant",
                  {share(rate("tandem_tenant_requests_total", "tenant", outcome="~failed|unavailable|deadline"),
                         rate("tandem_tenant_requests_total", "tenant")): "{{tenant}}"}, "percentunit", width=12),
            Panel("Used in the shown range, by tenant",
                  {f"sum by (tenant, direction) (increase({of('tandem_tenant_tokens_total')}[$__range]))":
                   "{{tenant}} {{direction}}"}, "tokens", kind="bargauge", width=12),
        ),
    },
)  # fmt: skip

RAY = Board(
    "tandem-ray",
    "Tandem / Ray and capacity",
    {
        "Replicas": (
            REPLICAS,
            Panel("Starts", {f"sum by (model) (increase({of('tandem_replica_starts_total')}[15m]))": "{{model}}"},
                  note="In 15 minutes."),
            Panel("Time to load", {f"max by (model) ({of('tandem_model_load_seconds')})": "{{model}}"}, "s"),
            JOBS, BACKLOG, QUEUE,
            Panel("Changes asked for by the autoscaler",
                  {f"sum by (model, direction) (increase({of('tandem_scaling_events_total')}[15m]))":
                   "{{model}} {{direction}}"}, note="In 15 minutes.", width=12),
            Panel("Held for a sleeping model", {f"sum by (model) ({of('tandem_requests_held')})": "{{model}}"},
                  width=12),
            Panel("Models", {of("tandem_model_info"): ""}, kind="table", width=24),
        ),
        "Processes": (
            Panel("Resident memory", {"tandem_process_resident_memory_bytes": "{{process}}"}, "bytes"),
            Panel("Time since the start", {"time() - tandem_process_start_time_seconds": "{{process}}"}, "s"),
            Panel("Age of the figures", {"tandem_snapshot_age_seconds": "{{process}}"}, "s", lines=(5,)),
            Panel("Canary of an idle engine", quantiles("tandem_canary_seconds", "process"), "s", width=24),
            Panel("Processes", {"tandem_process_info": ""}, kind="table", width=24),
        ),
        "Ray's own metrics": (
            Panel("Ongoing requests at Serve", {"sum by (deployment) (ray_serve_replica_processing_queries)":
                                                "{{deployment}}"}, note="Needs the job `ray` of prometheus.yml."),
            Panel("Node CPU", {"avg by (instance) (ray_node_cpu_utilization)": "{{instance}}"}, "percent", most=100),
            Panel("Node GPUs", {"avg by (instance) (ray_node_gpus_utilization)": "{{instance}}"}, "percent"),
        ),
    },
)  # fmt: skip

BOARDS = (OVERVIEW, TEXT, IMAGE, GATEWAY, RAY)


def files() -> dict[str, str]:
    """File name → its text, of every board."""
    return {f"{board.uid}.json": json.dumps(dashboard(board), indent=1) + "\n" for board in BOARDS}


def main() -> None:
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
