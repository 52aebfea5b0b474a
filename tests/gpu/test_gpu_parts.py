"""On a CUDA device: kernels are as near to float64 as rounding lets them be, and decode steps never wait for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loadtest.gpu import correct
from loadtest.gpu.bench import Bench
from loadtest.gpu.command import run_part
from loadtest.gpu.machine import About
from loadtest.gpu.overlap import synchronising_calls
from serve.options import ModelOptions, SpeculativeOptions
from serve.text.build import build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: kernels as the compiler makes them, and what waits for the device, remain unchecked",
    ),
]


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return correct.write_checkpoint(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("part", ["kernels", "overlap"])
def test_the_part_finds_nothing_wrong(part, tmp_path):
    bench = Bench(part, tmp_path, About.here("a test", is_rehearsal=False), budget_s=240.0)
    assert run_part(bench) == 0, bench.outcome.error


@pytest.mark.parametrize("arguments", [("triton_cases.py", "40"), ("store_cases.py",)])
def test_compiled_attention_stays_within_its_stated_errors(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "tests" / "models" / "attention" / arguments[0], *arguments[1:]]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


def test_what_synchronises_is_seen():
    values = torch.ones(3, device="cuda")
    with synchronising_calls() as calls:
        values.sum().item()
    assert len(calls) == 1


def test_speculation_changes_no_token(folder):
    looked_up = SpeculativeOptions(method="ngram")
    plain = correct.generate(folder, "cuda", correct.PROMPTS)
    assert correct.generate(folder, "cuda", correct.PROMPTS, speculative_config=looked_up) == plain


def test_a_draft_of_the_model_itself_changes_no_token(folder):
    itself = SpeculativeOptions(model=str(folder), num_speculative_tokens=3)
    plain = correct.generate(folder, "cuda", correct.PROMPTS)
    assert correct.generate(folder, "cuda", correct.PROMPTS, speculative_config=itself) == plain


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "int8"])
def test_a_quantised_cache_gives_the_tokens_of_the_cpu(folder, kv_cache_dtype):
    """Both quantise alike, from each row alone; in float32 nothing else differs."""
    prompts = correct.PROMPTS[:4]
    expected = correct.generate(folder, "cpu", prompts, kv_cache_dtype=kv_cache_dtype)
    assert correct.generate(folder, "cuda", prompts, kv_cache_dtype=kv_cache_dtype) == expected


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_give_nearly_the_tokens_of_the_cpu(folder, quantization):
    """Products round otherwise, so a token may tip, and all after it: most requests must stay as they are."""
    expected = correct.generate(folder, "cpu", correct.PROMPTS, quantization=quantization)
    found = correct.generate(folder, "cuda", correct.PROMPTS, quantization=quantization)
    assert correct.share_changed(found, expected) <= 0.5


def test_every_graph_is_captured_while_idle_and_changes_no_token(folder):
    options = ModelOptions(
        model=str(folder), device="cuda", dtype="float32", max_num_seqs=64, kv_cache_memory_bytes=64 << 20
    )
    engine, _ = build_engine(options, progress=False)
    units = 0
    while engine.use_idle_time():
        units += 1
    assert units > 0
    streams = [engine.submit(correct.sequence(i, prompt)) for i, prompt in enumerate(correct.PROMPTS)]
    while engine.step():
        pass
    tokens = [[token for update in stream.take() for token in update.token_ids] for stream in streams]
    assert tokens == correct.generate(folder, "cuda", correct.PROMPTS, enforce_eager=True)
