"""The metrics: one table, bounded labels, cumulative snapshots, text that Prometheus reads."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.engine.interface import StepStats
from serve.engine.job import Job
from serve.events import FinishReason
from serve.exposition import render
from serve.metrics import LATENCY_S, METRICS, Series, Snapshot
from serve.recorder import EngineObserver, Recorder

UNITS = ("seconds", "tokens", "rows", "bytes", "ratio", "blocks", "jobs", "info")


def values(text: str) -> dict[str, float]:
    """Sample name with its labels, the process left out → value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if key != "process")
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def full_recorders() -> list[Recorder]:
    """One recorder of each role with every metric of the table written once."""
    recorders = [Recorder("gateway-0", "gateway"), Recorder("replica-0", "replica"), Recorder("hub", "hub")]
    for recorder in recorders:
        recorder.admit("m")
        role = recorder.process.split("-")[0]
        for metric in METRICS.values():
            if role in metric.roles:
                labels = {
                    label: "m" if label == "model" else (allowed or ("x",))[0]
                    for label, allowed in metric.labels.items()
                }
                write = {"counter": recorder.count, "gauge": recorder.set, "histogram": recorder.observe}[metric.kind]
                write(metric.name, 0.25, **labels)
    return recorders


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_names_follow_the_conventions(metric):
    assert metric.name.startswith("tandem_") and metric.name.islower()
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert (metric.kind == "histogram") == bool(metric.buckets)
    assert metric.help.endswith(".") and list(metric.buckets) == sorted(set(metric.buckets))
    if metric.kind == "histogram":
        assert metric.name.endswith(UNITS)


def test_latency_buckets_reach_from_half_a_millisecond_to_minutes():
    assert LATENCY_S[0] == 0.0005 and LATENCY_S[-1] >= 300 and len(LATENCY_S) <= 26
    assert all(after / before < 2 for before, after in itertools.pairwise(LATENCY_S))


def test_every_metric_is_exposed_and_prometheus_accepts_the_text():
    text = render(recorder.snapshot() for recorder in full_recorders())
    exposed = {sample.split("{")[0] for sample in values(text)}
    for metric in METRICS.values():
        assert metric.name + ("_sum" if metric.kind == "histogram" else "") in exposed
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: the text was parsed by prometheus-client only")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_histogram_counts_each_observation_in_every_bucket_above_it():
    recorder = Recorder("r", "gateway")
    recorder.admit("m")
    for value in (0.0001, 0.0005, 0.003, 1e6):
        recorder.observe("tandem_time_to_first_token_seconds", value, model="m")
    recorder.observe("tandem_time_to_first_token_seconds", 0.003, times=3, model="m")
    found = values(render([recorder.snapshot()]))
    name = "tandem_time_to_first_token_seconds"
    assert found[f"{name}_bucket{{le=0.0005,model=m}}"] == 2
    assert found[f"{name}_bucket{{le=0.005,model=m}}"] == 6
    assert found[f"{name}_bucket{{le=500.0,model=m}}"] == 6
    assert found[f"{name}_bucket{{le=+Inf,model=m}}"] == found[f"{name}_count{{model=m}}"] == 7
    assert found[f"{name}_sum{{model=m}}"] == pytest.approx(1e6 + 0.0126)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("tandem_nonsense_total", {"model": "m"}),
        ("tandem_prompt_tokens_total", {"model": "never-served"}),
        ("tandem_prompt_tokens_total", {}),
        ("tandem_rejections_total", {"model": "m", "reason": "because"}),
        ("tandem_requests_total", {"model": "m", "endpoint": "/v1/secret", "outcome": "success"}),
        ("tandem_preemptions_total", {"model": "m"}),
    ],
)
def test_names_and_labels_outside_the_table_are_refused(name, labels):
    recorder = Recorder("g", "gateway")
    recorder.admit("m")
    with pytest.raises(ValueError, match=r"tandem_|never-served"):
        recorder.count(name, 1, **labels)


def test_counters_of_a_served_model_start_at_zero():
    recorder = Recorder("g", "gateway")
    recorder.admit("m")
    assert values(render([recorder.snapshot()]))["tandem_prompt_tokens_total{model=m}"] == 0


def test_label_values_are_escaped():
    recorder = Recorder('g"\n', "gateway")
    recorder.admit('m"\\\n')
    recorder.count("tandem_prompt_tokens_total", 3, model='m"\\\n')
    (sample,) = [
        s for f in text_string_to_metric_families(render([recorder.snapshot()])) for s in f.samples if s.value == 3
    ]
    assert sample.labels == {"model": 'm"\\\n', "process": 'g"\n'}


def test_series_of_another_version_are_left_out():
    strange = (Series("tandem_future_total", (), (1.0,)), Series("tandem_step_jobs", ("m",), (1.0, 2.0)))
    assert values(render([Snapshot("p", strange)])) == {}


def test_a_reading_that_fails_leaves_the_others_alone(caplog):
    recorder = Recorder("r", "replica")
    recorder.admit("m")
    recorder.follow("tandem_kv_cache_blocks", lambda: 1 / 0, model="m")
    recorder.follow("tandem_requests_running", lambda: 2, model="m")
    assert values(render([recorder.snapshot()]))["tandem_requests_running{model=m}"] == 2
    assert "metric not read" in caplog.text


def test_the_observer_counts_steps_and_ends():
    recorder = Recorder("r", "replica")
    observer = EngineObserver(recorder, "m")
    preemptions = [0]
    observer.follow("tandem_preemptions_total", lambda: preemptions[0])
    observer.on_step(StepStats(duration_s=0.004, num_jobs=3, num_tokens=40))
    observer.on_finish(Job(id="a", arrival=1.0, first_scheduled=1.5, finish_reason=FinishReason.STOP))
    observer.on_finish(Job(id="b", arrival=1.0, cancelled=3.0, finished=3.25, finish_reason=FinishReason.CANCELLED))
    preemptions[0] = 2
    found = values(render([recorder.snapshot()]))
    assert found["tandem_step_tokens_sum{model=m}"] == 40 and found["tandem_step_jobs_bucket{le=4.0,model=m}"] == 1
    assert found["tandem_request_queue_time_seconds_sum{model=m}"] == 0.5
    assert found["tandem_request_queue_time_seconds_count{model=m}"] == 1
    assert found["tandem_cancel_to_free_seconds_sum{model=m}"] == 0.25
    assert found["tandem_jobs_total{model=m,reason=cancelled}"] == found["tandem_jobs_total{model=m,reason=stop}"] == 1
    assert found["tandem_preemptions_total{model=m}"] == 2


def test_image_steps_are_told_by_stage_beside_the_steps_of_all_kinds():
    recorder = Recorder("r", "replica")
    observer = EngineObserver(recorder, "m")
    observer.on_step(StepStats(duration_s=0.5, num_jobs=5, num_tokens=640, stage="denoise", num_rows=8))
    observer.on_step(StepStats(duration_s=0.1, num_jobs=1, num_tokens=64, stage="decode", num_rows=1))
    observer.on_step(StepStats(duration_s=0.004, num_jobs=3, num_tokens=40))
    found = values(render([recorder.snapshot()]))
    assert found["tandem_image_step_rows_sum{model=m,stage=denoise}"] == 8
    assert found["tandem_image_step_tokens_sum{model=m,stage=decode}"] == 64
    assert found["tandem_image_step_seconds_sum{model=m,stage=denoise}"] == 0.5
    assert found["tandem_step_seconds_count{model=m}"] == 3
