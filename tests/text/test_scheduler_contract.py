"""The token scheduler's contract over random schedules and settings, on a device that would notice a wrong block.

Beside the engine's contract tests this one varies what only tokens have: block size, budget, prefixes and salts,
sampling options, prompt log-probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from beams import Found
from hypothesis import given, settings
from hypothesis import strategies as st
from token_device import (
    VOCAB,
    RandomLength,
    TokenDevice,
    beam_group,
    beams_alone,
    logprob_of,
    make_scheduler,
    next_token,
    sequence,
    tokens_alone,
)

from serve.engine.engine import Engine
from serve.engine.job import Status
from serve.errors import ContextTooLong, InvalidRequest, RequestFailed
from serve.events import FinishReason
from serve.text.beams.group import BeamGroup, BeamUpdate
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[None]:
    """Failures are made on purpose; their tracebacks would be most of the tests' time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@dataclass
class Plan:
    """What happens to one job: when it comes, when it is cancelled, whether computing it fails."""

    job: Sequence
    """Maybe a `BeamGroup`."""
    arrives: int
    cancelled: int | None
    is_poison: bool


@st.composite
def plans(draw, max_tokens=(20, 20, 20, 12, 5, 2, 1, 0)) -> Plan:
    family, length = draw(st.integers(1, 2)), draw(st.sampled_from([1, 7, 8, 12, 16, 16, 21]))
    own_tail = draw(st.lists(st.integers(1, VOCAB - 1), max_size=5))
    prompt = [(family * 5 + i * i) % VOCAB for i in range(length)] + own_tail
    job = draw(beam_groups(prompt) if draw(st.integers(0, 3)) == 3 else sequences(prompt, max_tokens))
    cancelled = draw(st.sampled_from([None] * 6 + [0, 1, 3, 6]))
    return Plan(job, draw(st.sampled_from([0, 0, 1, 2, 8])), cancelled, draw(st.integers(0, 14)) == 14)


@st.composite
def sequences(draw, prompt: list[int], max_tokens) -> Sequence:
    return sequence(
        prompt,
        priority=draw(st.sampled_from([0, 0, 1])),
        salt=draw(st.sampled_from(["", "", "", "tenant"])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        max_tokens=draw(st.sampled_from(max_tokens)),
        min_tokens=draw(st.integers(0, 3)),
        ignore_eos=draw(st.sampled_from([True, True, False])),
        stop_token_ids=draw(st.sampled_from([(), (), (3,)])),
        seed=draw(st.integers(0, 3)),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
        logprobs=draw(st.sampled_from([None, 0])),
    )


@st.composite
def beam_groups(draw, prompt: list[int]) -> BeamGroup:
    num_beam_groups = draw(st.sampled_from([1, 1, 2]))
    num_beams = num_beam_groups * draw(st.integers(1, 3))
    return beam_group(
        prompt,
        num_beams,
        num_beam_groups=num_beam_groups,
        diversity_penalty=0.3 if num_beam_groups > 1 else 0.0,
        length_penalty=draw(st.sampled_from([1.0, 0.0, 2.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        num_returned=draw(st.sampled_from([1, 1, num_beams])),
        priority=draw(st.sampled_from([0, 0, 1])),
        salt=draw(st.sampled_from(["", "", "tenant"])),
        max_tokens=draw(st.sampled_from([12, 8, 5, 2, 1])),
        min_tokens=draw(st.integers(0, 3)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (), (3,)])),
        seed=draw(st.integers(0, 3)),
        logprobs=0 if num_beam_groups == 1 else None,
    )


def check_books(scheduler: TokenScheduler, unfinished: int) -> None:
    """Conservation, and the counters behind `load` against what they count."""
    held = {block for seq in scheduler._running for part in seq.holders for block in part.blocks}
    held |= {block for tables in scheduler._freed_with.values() for table in tables for block in table}
    assert scheduler.kv_cache.num_free + len(held) == scheduler.kv_cache.num_blocks
    for seq in scheduler._running:
        assert seq.num_seats > 1 or seq.num_computed < len(seq.token_ids), "what is not known is not computed"
        assert seq.num_in_doubt < max(seq.num_pending, 1)
    load = scheduler.load()
    waiting = [*scheduler._waiting, *scheduler._claims._waits_for]
    assert load.running + load.waiting == unfinished
    assert load.tokens_waiting == sum(len(seq.token_ids) for seq in waiting)
    assert scheduler._queued.num_owed == sum(seq.num_owed for seq in waiting) <= load.tokens_waiting
    assert all(seq.status is Status.WAITING and not any(part.blocks for part in seq.holders) for seq in waiting)
    assert load.memory == pytest.approx(len(held) / scheduler.kv_cache.num_blocks)
    assert scheduler._claims or not scheduler._claims._waiters
    assert set(scheduler._claims._owners.values()) <= set(scheduler._running)


def most_blocks(job: Sequence, block_size: int) -> int:
    """At the job's longest; full blocks of its prompt are shared by all beams."""
    num_positions = job.num_prompt + max(job.sampling.max_tokens - 1, 0)
    num_shared = job.num_prompt // block_size if job.num_seats > 1 else 0
    return num_shared + job.num_seats * (-(-num_positions // block_size) - num_shared)


def check_beams(job: BeamGroup, reason: FinishReason | None, updates: list[BeamUpdate]) -> None:
    """What was delivered on the way begins the best hypothesis; at the end all are the oracle's, ids and scores."""
    expected = beams_alone(job.token_ids, job.sampling)[: job.num_returned]
    delivered = [node.token_id for update in updates for node in update.settled]
    assert delivered == list(expected[0].tokens[: len(delivered)])
    assert job.num_returned == 1 or not delivered
    if reason not in (FinishReason.CANCELLED, FinishReason.ERROR):
        assert [Found.of(hypothesis) for hypothesis in updates[-1].hypotheses] == expected
        assert reason is expected[0].reason


@settings(max_examples=300, deadline=None)
@given(
    wanted=st.lists(plans(), min_size=1, max_size=10),
    depth=st.sampled_from([0, 1, 3]),
    capacity=st.sampled_from([41, 45, 50, 60, 90]),
    block_size=st.integers(1, 4),
    budget=st.sampled_from([1, 3, 8, 20, 50]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    caching=st.booleans(),
    num_drafts=st.sampled_from([0, 0, 1, 3, 6]),
    is_staged=st.booleans(),
    runs_ahead=st.booleans(),
)
def test_contract(wanted, **options):
    """Progress, budget, conservation, once and transparency, with preemption, cancel, sharing, failures and drafts."""
    check_contract(wanted, **options)


@settings(max_examples=150, deadline=None)
@given(
    wanted=st.lists(plans(max_tokens=(36, 36, 25, 7)), min_size=1, max_size=6),
    depth=st.sampled_from([1, 1, 3]),
    capacity=st.sampled_from([64, 80, 120, 200]),
    block_size=st.integers(1, 4),
    budget=st.sampled_from([8, 20, 50]),
    max_num_seqs=st.sampled_from([2, 8]),
    caching=st.booleans(),
    num_drafts=st.sampled_from([1, 2, 3, 6]),
)
def test_contract_while_drafts_are_in_flight(wanted, **options):
    """The same where sequences go on behind their drafts most of the time."""
    check_contract(wanted, **options, is_staged=False, runs_ahead=True)


def check_contract(
    wanted, *, depth, capacity, block_size, budget, max_num_seqs, caching, num_drafts, is_staged, runs_ahead
):
    """`is_staged`: the batches in flight are in the stages of a pipeline. `runs_ahead`: drafts stay on the device."""
    num_blocks = capacity // block_size
    scheduler = make_scheduler(
        num_blocks, block_size, enable_prefix_caching=caching,
        max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=64,
        draft_length=RandomLength(num_drafts), num_stages=depth + 1 if is_staged else 1, runs_ahead=runs_ahead,
    )  # fmt: skip
    poison = {id(plan.job) for plan in wanted if plan.is_poison}
    device = TokenDevice(
        num_blocks,
        block_size,
        lambda batch: any(id(job) in poison for job in batch.jobs),
        is_staged=is_staged and depth > 0,
        runs_ahead=runs_ahead,
        kv_cache=scheduler.kv_cache,
    )
    now = [0.0]
    engine = Engine(scheduler, device, depth=depth, clock=lambda: now[0])
    prompts, streams, outputs = {}, {}, {}
    ended: set[str] = set()
    step = 0
    while step <= 20 or len(ended) < len(streams):
        assert step < 3000, "no progress"
        for i, plan in enumerate(wanted):
            if plan.arrives == step:
                plan.job.id = f"job-{i}"
                prompts[plan.job.id] = list(plan.job.token_ids)
                try:
                    streams[plan.job.id] = engine.submit(plan.job)
                    outputs[plan.job.id] = []
                except ContextTooLong:
                    assert most_blocks(plan.job, block_size) > num_blocks
                except InvalidRequest:
                    assert plan.job.num_seats > min(max_num_seqs, budget)
            if plan.cancelled is not None and plan.arrives + plan.cancelled == step and plan.job.id in streams:
                engine.cancel(plan.job.id)
        num_batches = len(device.batches)
        engine.step()
        engine.check_health()
        now[0] += 0.01
        step += 1
        for batch in device.batches[num_batches:]:
            assert batch.num_tokens <= budget
            assert len(batch.rows) == len({row.job for row in batch.rows}) <= max_num_seqs
        for name, stream in streams.items():
            if name in ended:
                continue
            try:
                outputs[name] += stream.take()
            except RequestFailed:
                assert id(stream.job) in poison
            if stream.finish_reason is not None:
                ended.add(name)
        check_books(scheduler, len(streams) - len(ended))
    while engine.step():
        pass
    assert scheduler.kv_cache.num_free == num_blocks
    assert not scheduler._freed_with

    for name, stream in streams.items():
        job, prompt = stream.job, prompts[name]
        if isinstance(job, BeamGroup):
            check_beams(job, stream.finish_reason, outputs[name])
            continue
        expected = tokens_alone(prompt, job.sampling)
        token_ids = [token_id for update in outputs[name] for token_id in update.token_ids]
        if stream.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
            assert token_ids == expected[: len(token_ids)]
            continue
        assert token_ids == expected
        assert job.token_ids == prompt + expected
        if len(expected) == job.sampling.max_tokens:
            assert stream.finish_reason is FinishReason.LENGTH
        else:
            assert stream.finish_reason is FinishReason.STOP
            assert job.stop_token_id == next_token(prompt + expected, job.sampling.seed)
        logprobs = [entry for update in outputs[name] for entry in update.logprobs or ()]
        wants = job.sampling.logprobs is not None
        full = prompt + expected
        assert logprobs == [logprob_of(full[: i + 1]) for i in range(len(prompt), len(full)) if wants]
        scored = [update.prompt_logprobs for update in outputs[name] if update.prompt_logprobs is not None]
        if job.prompt_logprobs is None:
            assert scored == []
        else:
            assert scored == [(None, *(logprob_of(prompt[: i + 1]) for i in range(1, len(prompt))))]
            assert outputs[name][0].prompt_logprobs is not None, "before the first token"
