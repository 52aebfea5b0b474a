"""The runner over a device that is late (`async_device.py`): steps that overlap give the same tokens, nothing is read
or overwritten too early, and a step costs one copy to the device and one wait."""

from __future__ import annotations

import pytest
import torch
from async_device import AsyncQueue
from flat_attention import BLOCK, MAX_BLOCKS, Captures, FlatAttention
from tiny import tiny_model

from models import staging
from models.attention.base import KVCacheSpec
from models.attention.build import make_attention
from models.registry import load_text_model
from serve.engine.engine import Engine
from serve.request import BeamParams, SamplingParams
from serve.text.beams.group import BeamGroup
from serve.text.kv_cache import KVCache
from serve.text.runner import TokenRunner
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence
from serve.text.speculation.draft_model import DraftModel

torch.set_num_threads(1)
CPU = torch.device("cpu")
NUM_BLOCKS = 60
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0.8, "seed": 6, "top_k": 20, "frequency_penalty": 0.5, "logit_bias": ((7, 2.0),)},
    {"temperature": 0.0, "logprobs": 2, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return load_text_model(folder, device=CPU)


def build(model, depth: int, queue: AsyncQueue | None) -> Engine:
    spec = model.spec
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    runner = TokenRunner(
        model, make_attention("sdpa", cache, spec.num_heads), cache, num_blocks=NUM_BLOCKS, queue=queue
    )
    runner.warm_up()
    scheduler = TokenScheduler(
        KVCache(NUM_BLOCKS, BLOCK), max_num_seqs=8, max_num_batched_tokens=24, max_model_len=128, eos_token_ids=(),
        vocab_size=spec.vocab_size,
    )  # fmt: skip
    return Engine(scheduler, runner, depth=depth)


def jobs(num_output: int = 12) -> list[Sequence]:
    found = [
        Sequence(
            id=f"{i}", token_ids=[3 + i] * (3 + 5 * i), num_prompt=3 + 5 * i, prompt_logprobs=1 if i == 1 else None,
            sampling=SamplingParams(max_tokens=num_output, ignore_eos=True, **PARAMS[i % len(PARAMS)]),
        )
        for i in range(6)
    ]  # fmt: skip
    beams = SamplingParams(max_tokens=6, temperature=0.0, beams=BeamParams(num_beams=3))
    return [*found, BeamGroup(id="beams", token_ids=[9, 8, 7], num_prompt=3, sampling=beams, num_returned=2)]


def generate(engine: Engine, work: list[Sequence]) -> list[list]:
    streams = [engine.submit(job) for job in work]
    while engine.step():
        pass
    return [[str(output) for output in stream.take()] for stream in streams]


@pytest.mark.parametrize("depth", [0, 1])
def test_outputs_are_those_of_a_device_that_is_never_late(model, depth):
    expected = generate(build(model, 0, None), jobs())
    assert generate(build(model, depth, AsyncQueue()), jobs()) == expected


def test_a_plain_decode_step_is_one_copy_there_one_wait_and_the_tokens_back(model):
    queue = AsyncQueue()
    engine = build(model, 1, queue)
    for job in jobs(40)[:1]:
        engine.submit(job)
    for _ in range(5):
        engine.step()
    before = queue.num_uploads, queue.num_downloads, queue.num_waits
    for _ in range(10):
        engine.step()
    counts = queue.num_uploads, queue.num_downloads, queue.num_waits
    uploads, downloads, waits = (now - then for now, then in zip(counts, before))
    assert (uploads, waits) == (10, 10)
    assert downloads == 20, "the tokens, and the largest logit of each"


def test_too_few_buffers_cost_waits_and_no_tokens(model, monkeypatch):
    expected = generate(build(model, 0, None), jobs())
    queues = {num: AsyncQueue() for num in (1, 3)}
    for num, queue in queues.items():
        monkeypatch.setattr(staging, "_NUM_BUFFERS", num)
        assert generate(build(model, 1, queue), jobs()) == expected
    assert queues[1].num_waits > queues[3].num_waits


def generated(engine: Engine, work: list[Sequence]) -> list[list[int]]:
    streams = [engine.submit(job) for job in work]
    while engine.step():
        pass
    return [[token_id for output in stream.take() for token_id in output.token_ids] for stream in streams]


class ManyLengths:
    """A `DraftLength`: a different number every step."""

    def __init__(self) -> None:
        self._step = 0

    def choose(self, num_rows: int) -> int:
        self._step += 1
        return (0, 3, 1, 3, 2, 3)[self._step % 6]

    def observe(self, batch, output) -> None: ...


@pytest.mark.parametrize("draft_family", ["llama", "qwen3"])
def test_speculation_by_graphs_on_a_late_device_gives_the_tokens_of_plain_decoding(model, draft_family, tmp_path):
    """A draft model that is the target, and one that is nearly always wrong; most forwards of both are replayed."""
    work = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "seed": 6, "top_k": 20}]

    def requests() -> list[Sequence]:
        return [
            Sequence(
                id=f"{i}", token_ids=[3 + i] * (3 + 2 * i), num_prompt=3 + 2 * i,
                sampling=SamplingParams(max_tokens=24, ignore_eos=True, **work[i % 3]),
            )
            for i in range(4)
        ]  # fmt: skip

    expected = generated(build(model, 0, None), requests())
    spec, queue, captures = model.spec, AsyncQueue(), Captures()
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    tiny_model(draft_family).save_pretrained(tmp_path)
    draft = load_text_model(tmp_path, device=CPU)
    its = KVCacheSpec(draft.spec.num_layers, draft.spec.num_kv_heads, draft.spec.head_dim, BLOCK, spec.dtype, CPU)
    in_graphs = {"max_rows_in_graph": 8, "max_model_len": BLOCK * MAX_BLOCKS}
    proposer = DraftModel(
        draft, FlatAttention(its), its, num_blocks=NUM_BLOCKS, max_num_tokens=64, runs_ahead=True, queue=queue,
        **in_graphs,
    )  # fmt: skip
    runner = TokenRunner(
        model, FlatAttention(cache), cache, num_blocks=NUM_BLOCKS, proposer=proposer, max_drafts=3, queue=queue,
        **in_graphs,
    )  # fmt: skip
    for graphs in runner._all_graphs:
        graphs._capture = captures
    scheduler = TokenScheduler(
        KVCache(NUM_BLOCKS, BLOCK), max_num_seqs=8, max_num_batched_tokens=64, max_model_len=BLOCK * MAX_BLOCKS,
        eos_token_ids=(), vocab_size=spec.vocab_size, draft_length=ManyLengths(), runs_ahead=True,
    )  # fmt: skip
    runner.warm_up()
    while runner.capture_next():
        pass
    num_captured = captures.num
    assert generated(Engine(scheduler, runner, depth=1), requests()) == expected
    assert captures.num == num_captured == 4 * (2 + 4), "four sizes, for one and two tokens, and for up to four"
    assert captures.num_replays > 15
