"""The runner on CPU: one forward a step, positions and blocks in the right places, prompts scored, faults named."""

from __future__ import annotations

import math
from itertools import count

import pytest
import torch
from tiny import tiny_model

from models.attention.base import KVCacheSpec
from models.attention.build import make_attention
from models.registry import load_text_model
from models.text.base import CausalLM
from serve.engine.interface import DeviceFault
from serve.errors import RequestFailed
from serve.request import SamplingParams
from serve.text.runner import TokenRunner
from serve.text.sequence import Row, Sequence, TokenBatch, TokenOutput

torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK = 4


class Counting:
    """A `CausalLM` that counts its forwards and the rows it gives logits for."""

    def __init__(self, model: CausalLM):
        self.spec = model.spec
        self._model = model
        self.num_forwards = 0
        self.num_logit_rows = 0

    def forward(self, token_ids_T, positions_T, context):
        self.num_forwards += 1
        return self._model.forward(token_ids_T, positions_T, context)

    def logits(self, hidden_RD):
        self.num_logit_rows += len(hidden_RD)
        return self._model.logits(hidden_RD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(path)
    return path


@pytest.fixture
def model(folder) -> Counting:
    return Counting(load_text_model(folder, device=CPU))


@pytest.fixture
def runner(model) -> TokenRunner:
    spec = model.spec
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    runner = TokenRunner(model, make_attention("auto", cache, spec.num_heads), cache, num_blocks=64)
    runner.warm_up()
    model.num_forwards = model.num_logit_rows = 0
    return runner


class Driver:
    """Computes sequences step by step as a scheduler would, without one."""

    def __init__(self, runner: TokenRunner):
        self.runner = runner
        self._free = iter(range(64))
        self._steps = count()

    def sequence(self, name: str, prompt: list[int], *, prompt_logprobs: int | None = None, **params) -> Sequence:
        sampling = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, **params})
        return Sequence(
            id=name,
            token_ids=list(prompt),
            num_prompt=len(prompt),
            sampling=sampling,
            prompt_logprobs=prompt_logprobs,
        )

    def step(self, work: dict[Sequence, int]) -> TokenOutput:
        rows = []
        for seq, num_new in work.items():
            end = seq.num_computed + num_new
            while len(seq.blocks) * BLOCK < end:
                seq.blocks.append(next(self._free))
            samples = end == len(seq.token_ids)
            scores = seq.prompt_logprobs is not None and seq.num_computed < seq.num_prompt - 1
            new = seq.token_ids[seq.num_computed : end]
            rows.append(Row(seq, 0, new, seq.num_computed, seq.blocks, samples, end, scores))
        output = self.runner.collect(self.runner.submit(TokenBatch(next(self._steps), rows)))
        for row, sampled in zip(rows, output.token_ids):
            row.job.num_computed += len(row.token_ids)
            row.job.token_ids += sampled
        return output

    def generate(self, seq: Sequence, num_tokens: int, chunk: int = 64) -> list[int]:
        while seq.num_output < num_tokens:
            self.step({seq: min(chunk, len(seq.token_ids) - seq.num_computed)})
        return seq.token_ids[seq.num_prompt :]


def test_one_step_is_one_forward_for_chunks_and_decodes_of_eight_requests(runner, model):
    driver = Driver(runner)
    decoding = [driver.sequence(f"d{i}", [10 + i] * 5) for i in range(4)]
    driver.step(dict.fromkeys(decoding, 5))
    prefilling = [driver.sequence(f"p{i}", list(range(20 + i, 40 + i))) for i in range(4)]
    before = model.num_forwards
    output = driver.step({**dict.fromkeys(decoding, 1), **dict(zip(prefilling, (20, 3, 11, 20)))})
    assert model.num_forwards == before + 1
    assert [bool(sampled) for sampled in output.token_ids] == [True] * 4 + [True, False, False, True]


def test_only_sampling_rows_pay_for_logits(runner, model):
    driver = Driver(runner)
    driver.step({driver.sequence("a", [3] * 30): 20, driver.sequence("b", [4] * 9): 9})
    assert model.num_logit_rows == 1


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_of_any_size_generate_what_transformers_does(runner, chunk):
    prompt = [7, 30, 2, 99, 41, 41, 8, 5, 63, 10, 11]
    expected = tiny_model("qwen3").generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    driver = Driver(runner)
    assert driver.generate(driver.sequence("a", prompt), 12, chunk) == expected[0, len(prompt) :].tolist()


def test_a_sampled_sequence_is_the_same_alone_and_beside_others(runner):
    driver = Driver(runner)
    params = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.3, "seed": 42}
    alone = driver.generate(driver.sequence("alone", [5, 6, 7, 8, 9], **params), 15)
    mixed = driver.sequence("mixed", [5, 6, 7, 8, 9], **params)
    others = [driver.sequence(f"{i}", [30 + i] * (3 + 2 * i), temperature=1.0, seed=i) for i in range(3)]
    driver.step({mixed: 2, others[0]: 3})
    driver.step({others[0]: 1, mixed: 3, others[1]: 5})
    while mixed.num_output < 15:
        driver.step({others[0]: 1, others[1]: 1, mixed: 1})
    assert mixed.token_ids[mixed.num_prompt :] == alone


@pytest.mark.parametrize("chunk", [4, 64])
def test_prompt_logprobs_equal_transformers(runner, chunk, monkeypatch):
    monkeypatch.setattr("serve.text.prompt_scores._SCORED_AT_ONCE", 5 * runner.model.spec.vocab_size)
    prompt = [7, 30, 2, 99, 41, 41, 8, 5, 63, 10, 11, 12, 13]
    driver = Driver(runner)
    seq = driver.sequence("a", prompt, prompt_logprobs=2)
    entries = []
    while seq.num_computed < len(prompt):
        output = driver.step({seq: min(chunk, len(prompt) - seq.num_computed)})
        entries += output.prompt_logprobs[0] or []
    with torch.no_grad():
        theirs = tiny_model("qwen3")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in entries] == prompt[1:]
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(theirs[position, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == theirs[position].topk(2).indices.tolist()
        assert entry.rank == int((theirs[position] > theirs[position, entry.token_id]).sum()) + 1


def test_logprobs_of_rows_that_ask_reach_their_rows(runner):
    driver = Driver(runner)
    silent, asking = driver.sequence("a", [3, 4, 5]), driver.sequence("b", [6, 7, 8, 9], logprobs=3)
    half = driver.sequence("c", [1] * 10, logprobs=1)
    output = driver.step({silent: 3, half: 4, asking: 4})
    assert output.logprobs[0] is None and output.logprobs[1] is None
    (entry,) = output.logprobs[2]
    assert (entry.token_id,) == output.token_ids[2] and entry.rank == 1 and len(entry.top) == 3


def test_rows_without_anything_to_sample_give_nothing(runner, model):
    driver = Driver(runner)
    output = driver.step({driver.sequence("a", [3] * 30): 8})
    assert output.token_ids == [()] and output.logprobs == [None]
    assert model.num_logit_rows == 0


def test_logits_that_are_not_finite_name_the_job(runner, model):
    driver = Driver(runner)
    good, poisoned = driver.sequence("good", [3, 4]), driver.sequence("poisoned", [5, 6])
    original = model.logits

    def logits(hidden):
        values = original(hidden).clone()
        values[1, 0] = math.nan
        return values

    model.logits = logits
    with pytest.raises(RequestFailed, match="poisoned"):
        driver.step({good: 2, poisoned: 2})


def test_canary_accepts_a_sound_device_and_notices_a_changed_weight(runner, model, monkeypatch):
    driver = Driver(runner)
    driver.generate(driver.sequence("a", [3, 4, 5]), 10)
    runner.check()
    original = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: original(hidden) * 1.2)
    with pytest.raises(DeviceFault, match="canary"):
        runner.check()


def test_canary_leaves_the_cache_of_others_alone(runner):
    driver = Driver(runner)
    prompt = [7, 30, 2, 99, 41]
    expected = driver.generate(driver.sequence("undisturbed", prompt), 10)
    seq = driver.sequence("disturbed", prompt)
    while seq.num_output < 10:
        driver.step({seq: len(seq.token_ids) - seq.num_computed})
        runner.check()
    assert seq.token_ids[seq.num_prompt :] == expected
