"""Tracing that is off costs nothing; what it makes of a job's life."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.engine.job import Job
from serve.events import FinishReason
from serve.tracing import is_wanted, phases, start_tracing

ROOT = Path(__file__).resolve().parents[2]
HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        (HERE, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        (HERE | {"OTEL_SDK_DISABLED": "true"}, False),
        (HERE | {"OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_the_standard_environment_switches_it_on(environment, wanted):
    assert is_wanted(environment) == wanted


@pytest.mark.parametrize(
    ("process", "package"),
    [
        ("serve.replica, serve.text.backend, serve.image.backend", "opentelemetry"),
        ("serve.gateway.gateway", "opentelemetry.sdk"),  # its API is FastAPI's own import
    ],
)
def test_off_means_not_even_imported(process, package):
    code = f"import sys, {process}; from serve.tracing import start_tracing; assert start_tracing('p') is None; "
    code += f"assert not [name for name in sys.modules if name.startswith({package!r})]"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, timeout=240)


def test_without_the_extra_it_is_off_and_says_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", HERE["OTEL_EXPORTER_OTLP_ENDPOINT"])
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert start_tracing("p") is None
    assert "tandem-serve[otel]" in caplog.text


def job(**times: float) -> Job:
    return Job(id="j", arrival=1.0, finished=9.0, finish_reason=FinishReason.STOP, **times)


def test_a_jobs_life_is_cut_into_phases_without_gaps():
    text = job(first_scheduled=2.0, first_output=4.0)
    assert list(phases(text)) == [("queue", 1, 2), ("prefill", 2, 4), ("decode", 4, 9)]
    assert list(phases(job(first_scheduled=2.0))) == [("queue", 1, 2), ("prefill", 2, 9)]
    assert list(phases(job())) == [("queue", 1, 9)]


def test_steps_of_several_kinds_are_told_in_turns_and_only_for_who_is_traced():
    image = job(first_scheduled=2.0)
    image.enter("encode", 2.0)
    assert image.stages == []
    image.traceparent = "00-1-2-01"
    for stage, now in (("encode", 2.0), ("denoise", 3.0), ("denoise", 4.0), ("decode", 8.0)):
        image.enter(stage, now)
    assert list(phases(image)) == [("queue", 1, 2), ("encode", 2, 3), ("denoise", 3, 8), ("decode", 8, 9)]
