"""The token scheduler: one small scenario for every rule it follows. Its contract: `test_scheduler_contract.py`."""

from __future__ import annotations

import pytest
from token_device import EOS, VOCAB, make_scheduler, sequence

from serve.backend import Load
from serve.engine.job import Status
from serve.errors import ContextTooLong, InvalidRequest
from serve.events import FinishReason
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import PENDING, Sequence, TokenBatch, TokenOutput


def shape(batch: TokenBatch | None) -> dict[str, int]:
    """`{sequence: num_tokens}` of a step."""
    return {} if batch is None else {row.job.id: len(row.token_ids) for row in batch.rows}


def settle(scheduler: TokenScheduler, batch: TokenBatch, token_id: int = 1):
    sampled = [(token_id,) if row.samples else () for row in batch.rows]
    nothing = [None] * len(batch.rows)
    return list(scheduler.update(batch, TokenOutput(sampled, nothing, nothing)))


def run_step(scheduler: TokenScheduler, token_id: int = 1) -> dict[str, int]:
    batch = scheduler.schedule()
    if batch is not None:
        settle(scheduler, batch, token_id)
    return shape(batch)


def add(scheduler: TokenScheduler, *jobs: Sequence) -> None:
    for job in jobs:
        scheduler.validate(job)
        scheduler.add(job)


# budget and chunks


def test_prompts_that_fit_go_in_whole_beside_decodes():
    scheduler = make_scheduler(max_num_batched_tokens=20)
    add(scheduler, sequence([1] * 6, "a"))
    assert run_step(scheduler) == {"a": 6}
    add(scheduler, sequence([2] * 9, "b"), sequence([3] * 10, "c"))
    assert run_step(scheduler) == {"a": 1, "b": 9, "c": 10}
    assert run_step(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_a_long_prompt_alone_takes_the_whole_budget():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    add(scheduler, sequence([1] * 40, "long"))
    assert [run_step(scheduler) for _ in range(4)] == [{"long": 16}, {"long": 16}, {"long": 8}, {"long": 1}]


def test_a_long_prompt_takes_half_while_others_have_use_for_the_rest():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    add(scheduler, sequence([1] * 40, "long"), sequence([2] * 5, "short"))
    assert run_step(scheduler) == {"long": 8 + 3, "short": 5}
    add(scheduler, sequence([3] * 6, "late"))
    assert run_step(scheduler) == {"short": 1, "long": 8 + 1, "late": 6}


def test_only_a_few_prompts_are_half_done_at_a_time():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    add(scheduler, *(sequence([i + 1] * 40, f"{i}") for i in range(6)))
    assert run_step(scheduler) == {"0": 16 + 4, "1": 8, "2": 4}


def test_decodes_come_before_prompts():
    scheduler = make_scheduler(max_num_batched_tokens=4, max_num_seqs=4)
    add(scheduler, sequence([1] * 12, "long"))
    run_step(scheduler)
    add(scheduler, sequence([2], "x"), sequence([3], "y"))
    run_step(scheduler)
    assert run_step(scheduler) == {"x": 1, "y": 1, "long": 2}


def test_no_more_sequences_than_fit_into_a_step():
    scheduler = make_scheduler(max_num_seqs=100, max_num_batched_tokens=3)
    add(scheduler, *(sequence([i + 1], f"{i}") for i in range(5)))
    assert run_step(scheduler) == {"0": 1, "1": 1, "2": 1}
    assert run_step(scheduler) == {"0": 1, "1": 1, "2": 1}


def test_higher_priority_goes_first_until_the_other_has_waited_long():
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, sequence([1], "patient", arrival=0.0), sequence([2], "old", arrival=95.0))
    add(scheduler, sequence([3], "urgent", arrival=100.0, priority=1))
    order = []
    for _ in range(3):
        (name,) = run_step(scheduler)
        order.append(name)
        scheduler.remove(next(iter(scheduler._running)))
    assert order == ["patient", "urgent", "old"]


# the end


@pytest.mark.parametrize(
    "params, sampled, delivered, reason, stop",
    [
        ({"max_tokens": 2}, [1, 2], [1, 2], FinishReason.LENGTH, None),
        ({"ignore_eos": False}, [1, EOS], [1], FinishReason.STOP, EOS),
        ({"stop_token_ids": (7,)}, [1, EOS, 7], [1, EOS], FinishReason.STOP, 7),
        ({"max_tokens": 1, "ignore_eos": False}, [EOS], [], FinishReason.STOP, EOS),
        ({"min_tokens": 2, "stop_token_ids": (7,)}, [7, 7, 7], [7, 7], FinishReason.STOP, 7),
    ],
)
def test_how_a_sequence_ends(params, sampled, delivered, reason, stop):
    scheduler = make_scheduler()
    job = sequence([1, 2, 3], **params)
    add(scheduler, job)
    updates = []
    for token_id in sampled:
        updates += settle(scheduler, scheduler.schedule(), token_id)
    assert [token_id for update in updates if update.output for token_id in update.output.token_ids] == delivered
    assert [update.finish for update in updates][-1] is reason
    assert (job.stop_token_id, job.token_ids[job.num_prompt :]) == (stop, delivered)
    assert scheduler.schedule() is None
    assert scheduler.load() == Load()


def test_without_max_tokens_the_prompt_is_computed_and_nothing_sampled():
    scheduler = make_scheduler()
    add(scheduler, sequence([1, 2, 3], max_tokens=0))
    batch = scheduler.schedule()
    assert [row.samples for row in batch.rows] == [False]
    (update,) = settle(scheduler, batch)
    assert (update.output, update.finish) == (None, FinishReason.LENGTH)


# steps that overlap


def test_the_next_step_is_scheduled_over_the_pending_token():
    scheduler = make_scheduler()
    add(scheduler, sequence([1, 2, 3], max_tokens=3))
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    rows = [
        (row.token_ids, row.start, row.samples, row.sample_position) for b in (first, second, third) for row in b.rows
    ]
    assert rows == [([1, 2, 3], 0, True, 3), ([PENDING], 3, True, 4), ([PENDING], 4, True, 5)]
    assert scheduler.schedule() is None, "the third token is the last: nothing follows it"
    for batch in first, second, third:
        updates = settle(scheduler, batch, 9)
    assert updates[0].finish is FinishReason.LENGTH
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_blocks


def test_who_needs_its_history_waits_when_more_than_the_newest_token_is_pending():
    scheduler = make_scheduler()
    add(scheduler, sequence([1, 2, 3], presence_penalty=0.5))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.rows[0].token_ids == [PENDING]
    assert scheduler.schedule() is None
    settle(scheduler, first, 9)
    assert [row.token_ids for row in scheduler.schedule().rows] == [[PENDING]]
    settle(scheduler, second, 8)


def test_blocks_of_a_removed_sequence_stay_taken_until_the_last_step_that_writes_them():
    scheduler = make_scheduler()
    job = sequence([1, 2, 3])
    add(scheduler, job)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.remove(job)
    assert settle(scheduler, first) == []
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_blocks - 1
    assert settle(scheduler, second) == []
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_blocks


def test_what_was_scheduled_on_an_abandoned_step_is_stale():
    scheduler = make_scheduler()
    job = sequence([1, 2, 3])
    add(scheduler, job)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.abandon(first)
    retry = scheduler.schedule()
    assert settle(scheduler, second, 5) == []
    assert [row.token_ids for row in retry.rows] == [[1, 2, 3]]
    settle(scheduler, retry, 6)
    assert job.token_ids[job.num_prompt :] == [6]


def test_blocks_of_tokens_that_are_still_pending_are_not_shared():
    scheduler = make_scheduler(block_size=4)
    add(scheduler, sequence([1, 2, 3, 4, 5, 6], "a"))
    batches = [scheduler.schedule() for _ in range(4)]  # positions 0 to 8
    assert scheduler.kv_cache.find(scheduler.schedule().rows[0].job.block_hashes) == []
    settle(scheduler, batches[0], 7)
    settle(scheduler, batches[1], 8)
    assert len(scheduler.kv_cache.find(batches[0].rows[0].job.block_hashes)) == 1
    settle(scheduler, batches[2], 9)
    assert len(scheduler.kv_cache.find(batches[0].rows[0].job.block_hashes)) == 2


# stages


def test_decodes_are_spread_evenly_over_the_batches_in_the_stages():
    scheduler = make_scheduler(num_stages=3)
    add(scheduler, *(sequence([i + 1] * 5, f"{i}") for i in range(7)))
    run_step(scheduler)
    in_flight = [scheduler.schedule() for _ in range(3)]
    assert [sorted(shape(batch)) for batch in in_flight] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert scheduler.schedule() is None
    for _ in range(4):
        settle(scheduler, in_flight.pop(0))
        in_flight.append(scheduler.schedule())
        assert 1 <= len(in_flight[-1].rows) <= 3
        assert sorted(name for batch in in_flight for name in shape(batch)) == list("0123456")


def test_chunks_of_a_prompt_follow_each_other_through_the_stages_and_its_tokens_do_not():
    scheduler = make_scheduler(num_stages=3, max_num_batched_tokens=8)
    add(scheduler, sequence([1] * 16, "a"))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [shape(first), shape(second), scheduler.schedule()] == [{"a": 8}, {"a": 8}, None]
    settle(scheduler, first)
    assert scheduler.schedule() is None
    settle(scheduler, second, 9)
    assert [row.token_ids for row in scheduler.schedule().rows] == [[9]]


# shared prefixes


def test_a_prefix_that_is_known_is_not_computed_again():
    scheduler = make_scheduler()
    add(scheduler, sequence(range(1, 11), "a"))
    run_step(scheduler)
    job = sequence([*range(1, 9), 12, 12], "b")
    add(scheduler, job)
    assert run_step(scheduler) == {"a": 1, "b": 2}
    assert job.num_cached == 8
    assert (scheduler.num_prefix_query_tokens, scheduler.num_prefix_hit_tokens) == (20, 8)


def test_of_a_prompt_that_is_known_to_its_end_the_last_block_is_computed_for_its_logits():
    scheduler = make_scheduler()
    add(scheduler, sequence(range(1, 9), "a"))
    run_step(scheduler)
    add(scheduler, sequence(range(1, 9), "b"))
    assert run_step(scheduler) == {"a": 1, "b": 4}


def test_simultaneous_requests_wait_for_the_prefix_that_one_of_them_computes():
    scheduler = make_scheduler()
    add(scheduler, *(sequence([*range(1, 9), 12, i], f"{i}") for i in range(4)))
    assert run_step(scheduler) == {"0": 10}
    assert scheduler.load().waiting == 3
    assert run_step(scheduler) == {"0": 1, "1": 2, "2": 2, "3": 2}


def test_who_waits_for_a_prefix_lets_others_pass():
    scheduler = make_scheduler()
    add(scheduler, sequence([1] * 8, "a"), sequence([1] * 8, "b"), sequence([2] * 8, "c"))
    assert run_step(scheduler) == {"a": 8, "c": 8}


def test_who_waits_goes_on_when_all_that_is_shared_is_there():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, sequence([*[1] * 8, *[2] * 24], "long"), sequence([*[1] * 8, 3], "b"))
    assert run_step(scheduler) == {"long": 8}
    assert run_step(scheduler) == {"long": 4 + 3, "b": 1}


@pytest.mark.parametrize("is_settled", [True, False])
def test_who_waits_computes_itself_when_the_owner_is_gone(is_settled):
    scheduler = make_scheduler(max_num_batched_tokens=8)
    owner = sequence([1] * 16, "owner")
    add(scheduler, owner, sequence([1] * 14, "b"))
    batch = scheduler.schedule()
    assert shape(batch) == {"owner": 8}
    if is_settled:
        settle(scheduler, batch)
        scheduler.remove(owner)
        assert run_step(scheduler) == {"b": 14 - 8}
    else:
        scheduler.remove(owner)
        assert shape(scheduler.schedule()) == {"b": 8}


def test_a_waiting_sequence_can_be_removed():
    scheduler = make_scheduler()
    jobs = [sequence([1] * 8, name) for name in "ab"]
    add(scheduler, *jobs)
    batch = scheduler.schedule()
    assert shape(batch) == {"a": 8}
    load = scheduler.load()
    assert (load.running, load.waiting, load.tokens_waiting) == (1, 1, 8)
    for job in reversed(jobs):
        scheduler.remove(job)
    settle(scheduler, batch)
    assert scheduler.load() == Load()


def test_salts_keep_prefixes_apart():
    scheduler = make_scheduler()
    add(scheduler, sequence([1] * 8, "a", salt="x"), sequence([1] * 8, "b", salt="y"))
    assert run_step(scheduler) == {"a": 8, "b": 8}


def test_a_prompt_to_be_scored_is_computed_whole():
    scheduler = make_scheduler()
    add(scheduler, sequence([1] * 9, "a"))
    run_step(scheduler)
    add(scheduler, sequence([1] * 9, "b", prompt_logprobs=0))
    batch = scheduler.schedule()
    assert shape(batch) == {"a": 1, "b": 9}
    assert [row.scores_prompt for row in batch.rows] == [False, True]


# memory


def test_admission_asks_for_the_whole_prompt():
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=8)
    add(scheduler, sequence([1] * 16, "a"), sequence([2] * 12, "b"))
    assert run_step(scheduler) == {"a": 8}
    assert run_step(scheduler) == {"a": 8}
    assert run_step(scheduler) == {"a": 1}


def test_a_watermark_stays_free_for_those_that_run():
    scheduler = make_scheduler(num_blocks=40)
    add(scheduler, sequence([1] * 4, "a"), sequence([2] * 39 * 4, "b", max_tokens=1))
    assert list(run_step(scheduler)) == ["a"]
    scheduler = make_scheduler(num_blocks=40)
    add(scheduler, sequence([2] * 40 * 4, "alone", max_tokens=1))
    assert list(run_step(scheduler)) == ["alone"]


def tight(**jobs: Sequence) -> TokenScheduler:
    """Four blocks, each sequence with one full block after its prompt: the next step needs one for each."""
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, *jobs.values())
    run_step(scheduler)
    assert scheduler.kv_cache.num_free == 0
    return scheduler


def test_memory_for_a_decode_comes_from_the_least_urgent():
    low, high = sequence([1] * 8, "low"), sequence([2] * 8, "high", priority=1, arrival=1.0)
    scheduler = tight(low=low, high=high)
    assert run_step(scheduler) == {"high": 1}
    assert (low.num_preemptions, low.status, low.num_output) == (1, Status.WAITING, 1)
    assert scheduler.num_preemptions == 1


def test_of_equally_urgent_ones_the_victim_loses_least_per_freed_block():
    first, second = sequence([1] * 5, "first"), sequence([2] * 8, "second")
    scheduler = tight(first=first, second=second)
    assert run_step(scheduler) == {"second": 1}
    assert (first.num_preemptions, second.num_preemptions) == (1, 0)


def test_nothing_is_admitted_in_a_step_that_lacked_memory():
    scheduler = tight(a=sequence([1] * 8, "a"), b=sequence([2] * 8, "b"))
    add(scheduler, sequence([3], "c", priority=9))
    assert run_step(scheduler) == {"a": 1}


def test_a_preempted_sequence_goes_on_where_it_was():
    a, b = sequence([1] * 8, "a", max_tokens=2), sequence([2] * 8, "b")
    scheduler = tight(a=a, b=b)
    assert run_step(scheduler, 5) == {"a": 1}
    assert a.token_ids[a.num_prompt :] == [1, 5]
    batch = scheduler.schedule()
    assert [(row.job.id, row.token_ids, row.samples) for row in batch.rows] == [("b", [2, 2, 2, 2, 1], True)]
    settle(scheduler, batch, 6)
    assert b.token_ids[b.num_prompt :] == [1, 6]


def test_while_a_victims_blocks_are_in_flight_nobody_else_is_preempted():
    scheduler = make_scheduler(num_blocks=6)
    add(scheduler, *(sequence([i + 1] * 8, f"{i}", arrival=float(i)) for i in range(3)))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert shape(second) == {}
    assert scheduler.num_preemptions == 1
    settle(scheduler, first)
    assert run_step(scheduler) == {"0": 1, "1": 1}
    assert scheduler.num_preemptions == 1


def test_a_victim_is_not_scheduled_in_the_step_that_made_it_one():
    scheduler = make_scheduler(num_blocks=2)
    a, victim = sequence([1] * 3, "a", max_tokens=5), sequence([2], "victim")
    add(scheduler, a)
    run_step(scheduler)
    add(scheduler, victim)
    scheduler.abandon(scheduler.schedule())
    settle(scheduler, scheduler.schedule(only=a))
    assert run_step(scheduler) == {"a": 1}
    assert (a.num_preemptions, victim.num_preemptions) == (0, 1)


def test_alone_a_sequence_gets_what_it_needs_from_the_others():
    a, b = sequence([1] * 8, "a"), sequence([2] * 8, "b")
    scheduler = tight(a=a, b=b)
    for job, other in (b, a), (a, b):
        batch = scheduler.schedule(only=job)
        assert (batch.jobs, other.status) == ([job], Status.WAITING)
        settle(scheduler, batch)


# the door


@pytest.mark.parametrize(
    "job, error, words",
    [
        (sequence([]), InvalidRequest, "prompt is empty"),
        (sequence([1, VOCAB]), InvalidRequest, f"token id {VOCAB}.*0 to {VOCAB - 1}"),
        (sequence([1, -1]), InvalidRequest, "token id -1"),
        (sequence([1], stop_token_ids=(VOCAB,)), InvalidRequest, "stop_token_ids"),
        (sequence([1], logit_bias=((VOCAB, 1.0),)), InvalidRequest, "logit_bias"),
        (sequence([1], max_tokens=-1), InvalidRequest, "max_tokens is -1"),
        (sequence([1] * 200, max_tokens=57), ContextTooLong, "200 tokens and max_tokens is 57.*256 positions"),
        (sequence([1] * 200, max_tokens=0), ContextTooLong, "200 tokens.*160 positions of the whole KV cache"),
    ],
)
def test_what_can_never_run_is_refused(job, error, words):
    with pytest.raises(error, match=words):
        make_scheduler(num_blocks=40).validate(job)


def test_what_just_fits_is_accepted():
    for job in sequence([1] * 248), sequence([1] * 256, max_tokens=0):
        scheduler = make_scheduler()
        add(scheduler, job)
        while run_step(scheduler):
            pass
        assert scheduler.load() == Load()


# drafts


class Drafting:
    """A `DraftLength` that always wants the same."""

    def __init__(self, num_drafts: int):
        self.num_drafts = num_drafts

    def choose(self, num_rows: int) -> int:
        return self.num_drafts

    def observe(self, batch: TokenBatch, output: TokenOutput) -> None: ...


def verify(scheduler: TokenScheduler, sampled: tuple[int, ...], drafts: list[int]) -> TokenBatch:
    """A step of one row, as if the runner had drafted and drawn these."""
    batch = scheduler.schedule()
    assert batch is not None and len(drafts) <= batch.rows[0].num_drafts
    batch.rows[0].drafts = drafts
    scheduler.update(batch, TokenOutput([sampled], [None], [None]))
    return batch


def drafts(batch: TokenBatch | None) -> dict[str, int]:
    return {} if batch is None else {row.job.id: row.num_drafts for row in batch.rows}


def test_accepted_drafts_are_computed_and_rejected_ones_leave_no_block():
    scheduler = make_scheduler(draft_length=Drafting(6))
    job = sequence([1] * 3, "a", max_tokens=40)
    add(scheduler, job)
    run_step(scheduler, 2)
    assert (len(job.token_ids), len(job.blocks)) == (4, 1)
    batch = verify(scheduler, (5, 6, 9), [5, 6, 7, 8, 8, 8])
    assert drafts(batch) == {"a": 6} and batch.num_tokens == 7
    assert (job.num_computed, job.num_scheduled, len(job.token_ids), len(job.blocks)) == (6, 6, 7, 2)
    assert (job.num_drafted, job.num_accepted) == (6, 2)
    verify(scheduler, (3,), [1, 1, 1, 1, 1, 1])
    assert (job.num_computed, len(job.token_ids), len(job.blocks)) == (7, 8, 2)


def test_rejected_drafts_are_never_cached():
    scheduler = make_scheduler(draft_length=Drafting(6))
    job = sequence([1] * 3, "a", max_tokens=40)
    add(scheduler, job)
    run_step(scheduler, 2)
    verify(scheduler, (9,), [5, 6, 7, 8, 8, 8])
    scheduler.kv_cache.extend_hashes(hashes := [], [1, 1, 1, 2, 5, 6, 7, 8], "")
    assert len(scheduler.kv_cache.find(hashes)) == job.num_published == 1


def test_drafts_end_where_the_output_is_full_and_at_an_end_token():
    scheduler = make_scheduler(draft_length=Drafting(6))
    short, stopping = sequence([1], "a", max_tokens=4), sequence([1], "b", max_tokens=30, stop_token_ids=(7,))
    add(scheduler, short)
    run_step(scheduler, 2)
    assert drafts(verify(scheduler, (5, 5, 5), [5, 5])) == {"a": 2}
    assert short.token_ids == [1, 2, 5, 5, 5]
    add(scheduler, stopping)
    run_step(scheduler, 2)
    verify(scheduler, (5, 7, 5, 5), [5, 7, 5, 6])
    assert stopping.token_ids == [1, 2, 5] and stopping.stop_token_id == 7
    assert scheduler.kv_cache.num_free == scheduler.kv_cache.num_blocks


def test_drafts_take_what_decodes_and_prefills_leave_of_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=8, draft_length=Drafting(5))
    add(scheduler, sequence([1], "a", max_tokens=40), sequence([1], "b", max_tokens=40))
    run_step(scheduler, 2)
    batch = scheduler.schedule()
    assert drafts(batch) == {"a": 5, "b": 1} and batch.num_tokens == 8
    settle(scheduler, batch)
    add(scheduler, sequence([3] * 5, "c"))
    batch = scheduler.schedule()
    assert drafts(batch) == {"a": 1, "b": 0, "c": 0} and batch.num_tokens == 8


def test_nobody_is_preempted_for_a_draft_and_without_free_blocks_there_is_none():
    scheduler = make_scheduler(num_blocks=2, draft_length=Drafting(5))
    job, other = sequence([1] * 2, "a", max_tokens=4), sequence([1] * 3, "b", max_tokens=2)
    add(scheduler, job, other)
    run_step(scheduler, 2)
    assert len(job.blocks) + len(other.blocks) == 2
    batch = scheduler.schedule()
    assert drafts(batch) == {"a": 1, "b": 0}, "what its own block has room for"
    assert scheduler.num_preemptions == 0


def test_a_sequence_waits_for_its_drafts_and_drafts_wait_for_its_newest_token():
    scheduler = make_scheduler(draft_length=Drafting(0))
    job = sequence([1] * 3, "a", max_tokens=40)
    add(scheduler, job)
    first = scheduler.schedule()
    scheduler.draft_length.num_drafts = 3
    assert scheduler.schedule() is None, "its newest token is not known"
    settle(scheduler, first)
    second = scheduler.schedule()
    assert drafts(second) == {"a": 3} and scheduler.schedule() is None
    scheduler.abandon(second)
    assert (job.num_scheduled, len(job.blocks), job.num_in_doubt) == (3, 1, 0)
