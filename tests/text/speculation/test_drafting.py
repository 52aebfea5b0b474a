"""Sequences that go on while their drafts are in flight: what is planned for them, and whose blocks come free when."""

from __future__ import annotations

from token_device import make_scheduler, sequence

from serve.text.scheduler import TokenScheduler
from serve.text.sequence import PENDING, Row, Sequence, TokenBatch, TokenOutput


class Fixed:
    """A `DraftLength` that wants what it is told."""

    def __init__(self, num_drafts: int):
        self.num_drafts = num_drafts

    def choose(self, num_rows: int) -> int:
        return self.num_drafts

    def observe(self, batch: TokenBatch, output: TokenOutput) -> None: ...


def ahead(num_drafts: int, **options) -> TokenScheduler:
    return make_scheduler(draft_length=Fixed(num_drafts), runs_ahead=True, **options)


def add(scheduler: TokenScheduler, *jobs: Sequence) -> None:
    for job in jobs:
        scheduler.validate(job)
        scheduler.add(job)


def launch(scheduler: TokenScheduler) -> TokenBatch:
    """Schedule a step; the runner drafts all it is asked for."""
    batch = scheduler.schedule()
    assert batch is not None
    for row in batch.rows:
        row.drafts = [PENDING] * row.num_drafts
    return batch


def settle(scheduler: TokenScheduler, batch: TokenBatch, num_accepted: int = 0) -> None:
    sampled = [(1,) * (1 + min(num_accepted, row.num_drafts)) if row.samples else () for row in batch.rows]
    nothing = [None] * len(batch.rows)
    list(scheduler.update(batch, TokenOutput(sampled, nothing, nothing)))


def prefill(scheduler: TokenScheduler) -> None:
    settle(scheduler, launch(scheduler))


def only(batch: TokenBatch) -> Row:
    assert len(batch.rows) == 1
    return batch.rows[0]


def test_drafts_follow_drafts_in_flight_from_where_all_of_them_hold():
    scheduler = ahead(3)
    job = sequence([1] * 3, max_tokens=40)
    add(scheduler, job)
    prefill(scheduler)
    first, second = launch(scheduler), launch(scheduler)
    assert (only(first).start, only(first).num_in_doubt) == (3, 0)
    row = only(second)
    assert (row.token_ids, row.start, row.num_drafts, row.num_in_doubt) == ([PENDING], 7, 3, 3)
    settle(scheduler, first, num_accepted=1)
    assert (job.num_computed, job.num_scheduled, job.num_in_doubt, len(job.token_ids)) == (5, 9, 3, 6)
    settle(scheduler, second, num_accepted=3)
    assert (row.start, job.num_computed, job.num_scheduled, job.num_pending, job.num_in_doubt) == (5, 9, 9, 0, 0)


def test_a_plain_decode_follows_drafts_and_drafts_follow_one_pending_token():
    scheduler = ahead(2)
    job = sequence([1] * 3, max_tokens=40)
    add(scheduler, job)
    first = launch(scheduler)
    second = launch(scheduler)
    assert (only(second).token_ids, only(second).num_drafts) == ([PENDING], 2), "behind the prompt's first token"
    settle(scheduler, first)
    scheduler.draft_length.num_drafts = 0
    third = launch(scheduler)
    assert (only(third).start, only(third).num_drafts, only(third).num_in_doubt) == (6, 0, 2)
    settle(scheduler, second)
    assert job.num_scheduled == 5
    scheduler.draft_length.num_drafts = 2
    fourth = launch(scheduler)
    assert (only(fourth).start, only(fourth).num_in_doubt, only(fourth).num_drafts) == (5, 0, 2)


def test_drafts_wait_where_the_step_before_had_none_to_go_on_from():
    scheduler = ahead(2)
    job = sequence([1] * 3, max_tokens=40)
    add(scheduler, job)
    prefill(scheduler)
    first = launch(scheduler)
    only(first).drafts = []  # the proposer knew nothing
    assert scheduler.schedule() is None
    settle(scheduler, first)
    assert only(launch(scheduler)).num_drafts == 2


def test_who_needs_every_token_waits_for_its_drafts():
    scheduler = ahead(2)
    penalised = sequence([1] * 3, max_tokens=40, presence_penalty=1.0)
    add(scheduler, penalised)
    prefill(scheduler)
    assert only(launch(scheduler)).num_drafts == 2
    assert scheduler.schedule() is None


def test_nothing_is_planned_beyond_max_tokens_even_if_all_drafts_hold():
    scheduler = ahead(6)
    job = sequence([1] * 3, max_tokens=6)
    add(scheduler, job)
    prefill(scheduler)
    first = launch(scheduler)
    assert only(first).num_drafts == 4 and scheduler.schedule() is None
    settle(scheduler, first, num_accepted=2)
    assert only(launch(scheduler)).num_drafts == 1


def test_blocks_are_kept_as_far_as_steps_in_flight_may_write_and_no_further():
    scheduler = ahead(3)  # blocks of 4
    job = sequence([1] * 3, max_tokens=40)
    add(scheduler, job)
    prefill(scheduler)
    first, second = launch(scheduler), launch(scheduler)
    assert len(job.blocks) == 3, "up to position 10"
    settle(scheduler, first)
    assert (job.num_scheduled, len(job.blocks)) == (8, 2), "the second step writes up to position 7"
    settle(scheduler, second, num_accepted=3)
    assert (len(job.token_ids), len(job.blocks)) == (9, 2)


def test_blocks_of_a_failed_batch_wait_for_the_steps_behind_it():
    scheduler = ahead(3)
    job = sequence([1] * 3, max_tokens=40)
    add(scheduler, job)
    prefill(scheduler)
    num_free = scheduler.kv_cache.num_free
    first, second = launch(scheduler), launch(scheduler)
    scheduler.abandon(first)
    assert (job.num_scheduled, job.num_in_doubt, len(job.blocks)) == (3, 0, 1)
    assert scheduler.kv_cache.num_free == num_free - 2, "the second step may still write them"
    settle(scheduler, second)
    assert scheduler.kv_cache.num_free == num_free


def test_a_decode_without_room_waits_for_the_blocks_of_drafts_in_flight():
    scheduler = ahead(6, num_blocks=4)
    drafting, other = sequence([1] * 3, "drafting", max_tokens=12), sequence([2] * 4, "other", max_tokens=2)
    add(scheduler, drafting)
    prefill(scheduler)
    first = launch(scheduler)
    assert len(drafting.blocks) == 3
    add(scheduler, other)
    launch(scheduler)
    assert scheduler.schedule() is None and scheduler.num_preemptions == 0
    settle(scheduler, first)
    assert [row.job for row in launch(scheduler).rows] == [drafting, other]
    assert scheduler.num_preemptions == 0
