"""Seconds predicted from measured steps, against a device whose speed is known."""

from __future__ import annotations

from itertools import cycle, islice

import pytest

from serve.backend import Load
from serve.events import FinishReason
from serve.request import SamplingParams
from serve.text.kv_cache import KVCache
from serve.text.pace import FIRST_OUTPUT, MEMORY, TextPace
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Row, Sequence, TokenBatch

BASE_S, ROW_S, UNIT_S = 0.010, 0.0005, 0.0002


def make_pace(max_num_seqs: int = 8) -> TextPace:
    return TextPace(
        TokenScheduler(
            KVCache(64), max_num_seqs=max_num_seqs, max_num_batched_tokens=512, max_model_len=512, eos_token_ids=[],
            vocab_size=100,
        )
    )  # fmt: skip


def sequence(num_prompt: int = 8, num_output: int = 0) -> Sequence:
    ids = [1] * (num_prompt + num_output)
    return Sequence(id="s", token_ids=ids, num_prompt=num_prompt, sampling=SamplingParams(max_tokens=200))


def batch(num_decodes: int, num_prefill: int = 0) -> TokenBatch:
    lengths = [1] * num_decodes + [num_prefill] * bool(num_prefill)
    return TokenBatch(0, [Row(sequence(), 0, [1] * length, 0, [], True, 0) for length in lengths])


def step(pace: TextPace, num_decodes: int, num_prefill: int = 0) -> None:
    num_rows = num_decodes + bool(num_prefill)
    extra = max(0, num_prefill - 1)
    pace.on_step(batch(num_decodes, num_prefill), BASE_S + ROW_S * num_rows + UNIT_S * extra)


def test_a_device_is_measured_as_it_is():
    pace = make_pace()
    for num_decodes in islice(cycle([2, 30, 8, 16]), 4 * MEMORY):
        step(pace, num_decodes)
    for _ in range(MEMORY):
        step(pace, 4, 200)
    assert pace.step_s(20) == pytest.approx(BASE_S + 20 * ROW_S, rel=0.05)
    assert pace.job_s == pytest.approx(ROW_S * FIRST_OUTPUT, rel=0.05)
    assert pace.unit_s == pytest.approx(UNIT_S, rel=0.05)


def test_steps_of_one_size_do_not_change_what_a_row_costs():
    pace = make_pace()
    before = pace.job_s
    for _ in range(MEMORY):
        step(pace, 4)
    assert pace.job_s == before
    for num_decodes in islice(cycle([2, 30, 8, 16]), 4 * MEMORY):
        step(pace, num_decodes)
    for _ in range(8 * MEMORY):
        step(pace, 4)
    assert pace.job_s == pytest.approx(ROW_S * FIRST_OUTPUT, rel=0.05)


@pytest.mark.parametrize("num_prefill", [100, 500])
def test_a_replica_that_has_only_seen_prefill_does_not_think_its_decodes_free(num_prefill):
    pace = make_pace()
    for num_decodes in islice(cycle([2, 30, 8, 16]), 2 * MEMORY):
        step(pace, num_decodes, num_prefill)
    assert UNIT_S <= pace.job_s / FIRST_OUTPUT < UNIT_S + (BASE_S + 31 * ROW_S) / num_prefill
    assert pace.predict(Load(running=40, memory=0.5)).backlog_s > 40 * UNIT_S * FIRST_OUTPUT


def test_before_steps_have_differed_a_row_costs_no_more_than_a_step_takes():
    pace = make_pace()
    for _ in range(4):
        pace.on_step(batch(50), 0.010)
    assert pace.job_s == pytest.approx(0.010 / 50 * FIRST_OUTPUT)


def test_a_device_that_slows_down_is_noticed():
    pace = make_pace()
    for seconds in (0.01, 0.1):
        for _ in range(4 * MEMORY):
            pace.on_step(batch(0, 101), seconds)
        assert pace.unit_s == pytest.approx(seconds / 100, rel=0.05)


def test_only_outputs_that_ended_by_themselves_are_typical():
    pace = make_pace()
    for num_decodes in (4, 8):
        step(pace, num_decodes)
    before = pace.job_s
    job = sequence(num_output=1)
    job.finish_reason = FinishReason.CANCELLED
    pace.on_finish(job)
    assert pace.job_s == before
    job.finish_reason = FinishReason.STOP
    pace.on_finish(job)
    assert pace.job_s < before


def test_backlog_grows_with_owed_tokens_jobs_and_lack_of_seats():
    pace = make_pace(max_num_seqs=8)
    for num_decodes in islice(cycle([2, 8]), 2 * MEMORY):
        step(pace, num_decodes)
    loads = [
        Load(), Load(running=4, memory=0.1), Load(running=4, memory=0.1, tokens_owed=500),
        Load(running=4, memory=0.1, waiting=3, tokens_owed=500),
        Load(running=8, memory=0.1, waiting=9, tokens_owed=500),
    ]  # fmt: skip
    backlogs = [pace.predict(load).backlog_s for load in loads]
    assert backlogs[0] == 0.0 and sorted(set(backlogs)) == backlogs
    full = pace.predict(Load(running=4, memory=0.99)).backlog_s
    assert full > backlogs[1] + pace.step_s(4)  # there are seats, and no memory for one more
