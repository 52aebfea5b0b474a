"""Real models that go on while their drafts are in flight, over a device that is late: the tokens are those of one step
at a time, and the host waits for nothing but outputs."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from async_device import AsyncQueue
from tiny import tiny_model
from token_device import RandomLength

from models.attention.base import KVCacheSpec
from models.attention.build import make_attention
from models.registry import load_text_model
from models.text.base import CausalLM
from serve.engine.engine import Engine
from serve.request import BeamParams, SamplingParams
from serve.text.beams.group import BeamGroup
from serve.text.kv_cache import KVCache
from serve.text.runner import TokenRunner
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence, TokenBatch
from serve.text.speculation.draft_model import DraftModel

torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK = 4
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0.8, "seed": 6, "top_k": 20, "logit_bias": ((7, 2.0),), "logprobs": 1},
    {"temperature": 0.7, "seed": 7, "min_tokens": 9, "stop_token_ids": tuple(range(40))},
    {"temperature": 0.0, "logprobs": 2, "repetition_penalty": 1.2},
]
names = itertools.count()
READERS = {"flight.py", "async_device.py", "sampler.py", "token_filter.py"}
"""Who may read tensors: outputs that have arrived, the fake device, what stands for the sampler's kernels on CPU."""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> CausalLM:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return load_text_model(folder, device=CPU)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory) -> CausalLM:
    """The target, a little off: so some drafts hold and some do not."""
    folder = tmp_path_factory.mktemp("drafter")
    model = tiny_model("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return load_text_model(folder, device=CPU)


class Always(RandomLength):
    """As many drafts every step."""

    def choose(self, num_rows: int) -> int:
        return self._most


class Watching(TokenRunner):
    """Counts the rows that were launched while it was open where they begin."""

    num_behind_drafts = 0
    num_drafts_behind_drafts = 0

    def submit(self, batch: TokenBatch):
        handle = super().submit(batch)
        behind = [row for row in batch.rows if row.num_in_doubt]
        self.num_behind_drafts += len(behind)
        self.num_drafts_behind_drafts += sum(bool(row.drafts) for row in behind)
        return handle


def build(target, drafter, *, depth, queue=None, attention="sdpa", most=4, num_blocks=60, max_tokens=24) -> Engine:
    spec = target.spec
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    attentions = [make_attention(attention, cache, spec.num_heads) for _ in range(2)]
    proposer = DraftModel(
        drafter,
        attentions[1],
        cache,
        num_blocks=num_blocks,
        max_num_tokens=512,
        runs_ahead=depth > 0,
        queue=queue,
    )
    runner = Watching(target, attentions[0], cache, num_blocks=num_blocks, proposer=proposer, queue=queue)
    runner.warm_up()
    scheduler = TokenScheduler(
        KVCache(num_blocks, BLOCK), max_num_seqs=8, max_num_batched_tokens=max_tokens, max_model_len=128,
        eos_token_ids=(), vocab_size=spec.vocab_size, draft_length=RandomLength(most), runs_ahead=depth > 0,
    )  # fmt: skip
    return Engine(scheduler, runner, depth=depth)


def jobs(num_output: int = 16) -> list[Sequence]:
    found = [
        Sequence(
            id=f"{next(names)}", token_ids=[3 + i] * (3 + 4 * i), num_prompt=3 + 4 * i,
            prompt_logprobs=1 if i == 1 else None, sampling=SamplingParams(max_tokens=num_output, **params),
        )
        for i, params in enumerate(PARAMS)
    ]  # fmt: skip
    beams = SamplingParams(max_tokens=6, temperature=0.0, beams=BeamParams(num_beams=3))
    return [*found, BeamGroup(id=f"{next(names)}", token_ids=[9, 8, 7], num_prompt=3, sampling=beams, num_returned=2)]


def run(engine: Engine, work: list[Sequence]) -> list:
    streams = [engine.submit(job) for job in work]
    while engine.step():
        pass
    engine.check_health()
    assert engine.scheduler.kv_cache.num_free == engine.scheduler.kv_cache.num_blocks
    return [(outcome(job, stream.take()), stream.finish_reason) for job, stream in zip(work, streams)]


def outcome(job: Sequence, updates: list) -> list[int]:
    """The tokens that were delivered; of a search those of its best output."""
    if job.num_seats == 1:
        return [token_id for update in updates for token_id in update.token_ids]
    return [node.token_id for node in updates[-1].hypotheses[0].node.path()]


@pytest.mark.parametrize("attention", ["sdpa", "cpu"])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 32}, {"max_tokens": 8}], ids=["roomy", "tight", "small steps"])
def test_tokens_are_those_of_one_step_at_a_time(target, drafter, attention, options):
    expected = run(build(target, drafter, depth=0, most=0, attention=attention), jobs())
    for depth in (1, 3):
        engine = build(target, drafter, depth=depth, queue=AsyncQueue(), attention=attention, **options)
        work = jobs()
        assert run(engine, work) == expected
        assert engine._runner.num_drafts_behind_drafts > 0 < sum(job.num_accepted for job in work)


def test_the_host_reads_nothing_between_steps_but_outputs(target, drafter, monkeypatch):
    """One wait a step, and what a step leaves on the device stays there."""
    queue = AsyncQueue()
    engine = build(target, drafter, depth=1, queue=queue)
    engine.scheduler.draft_length = Always(3)
    plain = [job for job in jobs(60)[:3] if not job.sampling.logprobs]
    for job in plain:
        engine.submit(job)
    for _ in range(6):
        engine.step()
    readers: set[str] = set()
    for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name), readers))
    waits, batches = queue.num_waits, engine._runner.num_drafts_behind_drafts
    for _ in range(5):
        engine.step()
    assert engine._runner.num_drafts_behind_drafts - batches == 5 * len(plain)
    assert queue.num_waits - waits == 5
    assert readers <= READERS, readers - READERS


def watched(read, readers: set[str]):
    def method(tensor, *args, **kwargs):
        readers.add(sys._getframe(1).f_code.co_filename.rsplit("/", 1)[-1])
        return read(tensor, *args, **kwargs)

    return method
