"""On a CUDA device: decode graphs find a step's inputs where its one copy lays them, and keep within their memory."""

from __future__ import annotations

import gc

import pytest
import torch

from loadtest.gpu import correct
from loadtest.gpu.overlap import synchronising_calls
from serve.options import ModelOptions, SpeculativeOptions
from serve.request import SamplingParams
from serve.text.build import build_engine
from serve.text.cuda_graph import DecodeGraphs
from serve.text.graph_memory import measure_graphs
from serve.text.load import attention_of, cache_of
from serve.text.sequence import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: captures, their memory and where they read their inputs remain unchecked",
    ),
]
DRAFTS = {"none": None, "ngram": SpeculativeOptions(method="ngram", num_speculative_tokens=3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return correct.write_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("drafts", DRAFTS)
def test_all_graphs_take_no_more_than_was_set_aside(folder, drafts):
    options = ModelOptions(
        model=str(folder), device="cuda", kv_cache_memory_bytes=64 << 20, speculative_config=DRAFTS[drafts]
    )
    engine, _ = build_engine(options, progress=False)
    runner = engine._runner
    cache = cache_of(options, runner.model, torch.device("cuda"))
    most = 3 if DRAFTS[drafts] is not None else 0
    promised = measure_graphs(
        runner.model, attention_of(options, cache, 4), cache, max_rows=options.max_num_seqs, max_drafts=most
    )
    graphs = runner._graphs
    assert isinstance(graphs, DecodeGraphs)
    graphs._graphs.clear()
    before = free_bytes()
    for shape in reversed(graphs.shapes):
        graphs.capture(shape)
    assert before - free_bytes() <= promised
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_steps_are_one_copy_a_replay_and_no_wait(folder, temperature, monkeypatch):
    options = ModelOptions(model=str(folder), device="cuda", kv_cache_memory_bytes=64 << 20)
    engine, _ = build_engine(options, progress=False)
    runner = engine._runner
    for i in range(5):
        sampling = SamplingParams(max_tokens=100, temperature=temperature, seed=i, ignore_eos=True)
        engine.submit(Sequence(id=str(i), token_ids=[5 + i] * 20, num_prompt=20, sampling=sampling))
    for _ in range(20):
        engine.step()
    monkeypatch.setattr(DecodeGraphs, "_compute", lambda *_: pytest.fail("a step was computed without its graph"))
    before = runner.staging.num_copies
    with synchronising_calls() as calls:
        for _ in range(20):
            engine.step()
    assert calls == []
    assert runner.staging.num_copies - before == 20 and runner.staging.num_spilled == 0
    engine.close()
