"""The GPU measurements where there is no GPU: every part runs on the CPU with tiny shapes and tells what it left."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadtest.gpu import command
from loadtest.gpu.bench import Bench, Outcome, WrongResult, read_outcome
from loadtest.gpu.command import PARTS, main, run_all, run_part
from loadtest.gpu.machine import About

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


def rehearsal(part: str, folder: Path, budget_s: float = 100.0) -> Bench:
    about = About.here("a test", is_rehearsal=True, commit="test")
    return Bench(part, folder, about, budget_s=budget_s)


def rehearse(part: str, folder: Path) -> Outcome:
    bench = rehearsal(part, folder)
    assert run_part(bench) == 0, bench.outcome.error
    outcome = read_outcome(folder, part)
    assert outcome is not None and outcome.state == "done" and outcome.is_rehearsal
    return outcome


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_fails(capsys, tmp_path):
    assert main(["all", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_limits_have_three_figures(tmp_path):
    assert len(rehearse("limits", tmp_path).of_kind("limits")) == 3


def test_text_measures_each_thing(tmp_path):
    rehearse("limits", tmp_path)
    outcome = rehearse("text", tmp_path)
    kinds = {row["kind"] for row in outcome.rows}
    assert kinds == {"model", "decode", "prefill", "mixed", "prefix", "speculation"}
    assert [row["batch"] for row in outcome.of_kind("decode")] == [1, 3]
    assert all(row["roofline"] > 0 for row in outcome.of_kind("decode"))
    held = {row["drawn_from"]: row["held"] for row in outcome.of_kind("speculation")}
    assert held[1] == 1.0 > held[2]


def test_peer_answers_the_same_trace(tmp_path):
    ours, theirs = rehearse("text", tmp_path), rehearse("peer", tmp_path)
    for mine, other in zip(ours.of_kind("mixed"), theirs.of_kind("mixed"), strict=True):
        assert [mine[key] for key in ("load", "requests", "prompt_tokens", "output_tokens")] == [
            other[key] for key in ("load", "requests", "prompt_tokens", "output_tokens")
        ]


def test_correct_accepts_the_cpu_as_its_own_equal(tmp_path):
    outcome = rehearse("correct", tmp_path)
    assert {row.get("differs", row.get("levels", 0)) for row in outcome.of_kind("correct")} <= {0, 1}
    assert any("levels" in row for row in outcome.rows) == (importlib.util.find_spec("diffusers") is not None)


def test_overlap_counts_no_wait_on_the_cpu(tmp_path):
    assert len(rehearse("overlap", tmp_path).of_kind("overlap")) == 4


def test_images_need_diffusers_and_say_so_without(tmp_path, monkeypatch):
    monkeypatch.setattr("loadtest.gpu.images.diffusers_version", lambda: None)
    outcome = rehearse("images", tmp_path)
    assert outcome.rows == [] and "diffusers is not installed" in outcome.skipped[0]


def test_images_are_timed_by_rows(tmp_path):
    pytest.importorskip("diffusers")
    rows = rehearse("images", tmp_path).of_kind("images")
    assert [(row["model"].split()[0], row["rows"]) for row in rows] == [("DiT,", 1), ("DiT,", 3), ("FLUX.1-dev", 1)]
    assert all(row["images_s"] > 0 and row["step_ms"] > 0 for row in rows)


def test_quantised_decodes_are_set_beside_plain_ones(tmp_path):
    rows = rehearse("quantized", tmp_path).of_kind("quantized")
    assert [(row["weights"], row["kv"]) for row in rows] == [("int8", "as it is"), ("as they are", "fp8_e4m3")]
    assert all(row["tok_s"] > 0 for row in rows)


def test_cold_starts_are_told_by_stages(tmp_path):
    rows = rehearse("cold", tmp_path).of_kind("cold")
    assert [row["start"] for row in rows][-1] == "weights from cached files"
    for row in rows:
        stages = [row[f"{name}_s"] for name in ("imports", "device", "weights", "cache_and_graphs")]
        assert all(seconds >= 0 for seconds in stages)
        assert row["first_token_s"] == pytest.approx(sum(stages) + row["first_token_itself_s"], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_are_as_near_to_float64_as_rounding_lets_them(tmp_path):
    # A process of its own: Triton reads the variable when it is first imported, and others here may have done that.
    arguments = ["kernels", "--out", str(tmp_path), "--rehearse", "--commit", "test"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.gpu", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    outcome = read_outcome(tmp_path, "kernels")
    assert done.returncode == 0 and outcome is not None, done.stdout[-2000:] + done.stderr[-2000:]
    assert {row["backend"] for row in outcome.of_kind("attention")} >= {"sdpa", "triton"}


def test_all_runs_each_part_in_a_process_and_leaves_a_file_each(tmp_path, capfd):
    status = main(["all", "--out", str(tmp_path), "--rehearse", "--parts", "limits", "--commit", "test"])
    said = capfd.readouterr().out
    assert status == 0 and "targets" not in said and "no figure of this is a measurement" in said
    about = json.loads((tmp_path / "limits.json").read_text())["about"]
    assert about["is_rehearsal"] and about["commit"] == "test" and about["command"].startswith("python -m loadtest.gpu")


def test_a_part_that_hangs_is_cut_and_keeps_its_rows(tmp_path, monkeypatch, capfd):
    script = tmp_path / "hang.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from loadtest.gpu.bench import Bench\n"
        "from loadtest.gpu.machine import About\n"
        "bench = Bench('limits', Path(sys.argv[4]), About.here('x', is_rehearsal=True, commit='c'), budget_s=1.0)\n"
        "bench.row('limits', what='read', gb_s=1.0)\n"
        "Path(sys.argv[4], 'begun').touch()\n"
        "time.sleep(600)\n"
    )
    real = subprocess.Popen

    class Hanging(real):  # type: ignore[misc, valid-type]
        def __init__(self, arguments, **kwargs):
            super().__init__([arguments[0], str(script), *arguments[2:]], **kwargs)

        def wait(self, timeout=None):
            while timeout is not None and not (tmp_path / "begun").exists():
                if self.poll() is not None:
                    break
            return super().wait(0.01 if timeout is not None else None)

    monkeypatch.setattr(command.subprocess, "Popen", Hanging)
    assert run_all(tmp_path, ["limits"], 60.0, "a test", "c", True) == 1
    outcome = read_outcome(tmp_path, "limits")
    assert outcome is not None and outcome.state == "cut" and len(outcome.rows) == 1
    assert "limits: cut" in capfd.readouterr().out


def test_a_part_for_which_no_time_is_left_is_cut_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(command.subprocess, "Popen", lambda *_, **__: pytest.fail("begun"))
    assert run_all(tmp_path, ["limits", "text"], 5.0, "a test", "c", True) == 1
    outcomes = [read_outcome(tmp_path, part) for part in ("limits", "text")]
    assert [outcome and (outcome.state, outcome.error) for outcome in outcomes] == [
        ("cut", "no seconds were left for it")
    ] * 2


@pytest.mark.parametrize(("error", "state"), [(ValueError("no"), "failed"), (WrongResult("no"), "wrong")])
def test_a_part_that_fails_says_so_and_keeps_its_rows(tmp_path, monkeypatch, error, state):
    def run(bench: Bench) -> None:
        bench.row("limits", what="read", gb_s=1.0)
        raise error

    monkeypatch.setattr("loadtest.gpu.limits.run", run)
    assert run_part(rehearsal("limits", tmp_path)) == 1
    outcome = read_outcome(tmp_path, "limits")
    assert outcome is not None and outcome.state == state and len(outcome.rows) == 1 and "no" in str(outcome.error)


def test_one_measurement_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fail(self, driver):
        driver.submit([1, 2, 3], 4)
        raise ValueError("no profile")

    monkeypatch.setattr("loadtest.gpu.text._Measured.idle", fail)
    bench = rehearsal("text", tmp_path)
    assert run_part(bench) == 1
    assert bench.outcome.state == "failed" and bench.outcome.error == "fail: ValueError: no profile"
    assert bench.outcome.of_kind("mixed") and bench.outcome.of_kind("speculation")


def test_what_does_not_fit_the_budget_is_named_as_skipped(tmp_path):
    bench = rehearsal("limits", tmp_path, budget_s=1.0)
    assert bench.has_time("a moment", 0.0) and not bench.has_time("an hour", 3600.0)
    assert bench.outcome.skipped == ["an hour"]


def test_the_parts_fit_nine_minutes():
    *others, last = PARTS.values()
    assert sum(others) <= 9 * 60 - 10 and last >= 60
