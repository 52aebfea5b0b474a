"""How a load is sent: on time, so many at once, and until the server is gone. Waits are milliseconds."""

from __future__ import annotations

import asyncio
from itertools import islice, repeat

import pytest
from loads import FakeTarget, text_ask

from loadtest.measure.driver import Driver, Ending, Load, Run, warm_up
from loadtest.measure.outcome import Status
from loadtest.measure.watch import Watch
from loadtest.targets.target import Failed


def driven(target: FakeTarget, **load) -> Run:
    async def scenario() -> Run:
        return await Driver(target, Load(**{"asks": repeat(text_ask()), **load}))()

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_open_loop_sends_on_time_whatever_the_server_does():
    offsets = [0.0, 0.01, 0.02, 0.06]
    run = driven(FakeTarget(seconds=lambda ask: 0.1), offsets=offsets)
    assert [one.scheduled for one in run.outcomes] == offsets
    assert all(one.is_ok and one.sent >= one.scheduled for one in run.outcomes)
    assert run.outcomes[2].sent < run.outcomes[0].end and run.ending is Ending.DONE


def test_waiting_for_a_place_counts_in_the_latency_of_an_open_loop():
    target = FakeTarget(seconds=lambda ask: 0.05)
    run = driven(target, offsets=[0.0, 0.0, 0.0], max_concurrency=1)
    assert target.most_at_once == 1
    assert sorted(round(one.e2e / 0.05) for one in run.outcomes)[-1] >= 3
    assert max(one.lag for one in run.outcomes) >= 0.1


def test_a_closed_loop_keeps_so_many_open_and_has_no_lag():
    target = FakeTarget(seconds=lambda ask: 0.005)
    run = driven(target, num_requests=10, max_concurrency=3)
    assert (len(run.outcomes), target.most_at_once) == (10, 3)
    assert all(one.lag == 0.0 for one in run.outcomes)


def test_a_closed_loop_ends_after_its_time():
    run = driven(FakeTarget(seconds=lambda ask: 0.01), duration_s=0.1, max_concurrency=2)
    assert len(run.outcomes) >= 2 and run.duration_s < 5


def test_a_cancelled_request_is_left_and_is_no_failure():
    target = FakeTarget(seconds=lambda ask: 30.0 if ask.cancel_after_s else 0.0)
    asks = iter([text_ask(cancel_after_s=0.02), text_ask()])
    run = driven(target, asks=asks, offsets=[0.0, 0.0])
    assert [one.status for one in run.outcomes] == [Status.CANCELLED, Status.OK] and target.num_left == 1


def test_a_request_without_an_end_is_a_timeout():
    run = driven(FakeTarget(seconds=lambda ask: 30.0), offsets=[0.0], request_timeout_s=0.02)
    [one] = run.outcomes
    assert one.status is Status.TIMEOUT and "0.02 s" in one.error


def test_a_rejection_is_told_apart_from_an_error():
    failures = {1: Failed("429: busy", is_rejected=True), 2: Failed("500: boom")}
    run = driven(FakeTarget(failure=failures.get), offsets=[0.0, 0.0, 0.0])
    assert [one.status for one in run.outcomes] == [Status.REJECTED, Status.ERROR, Status.OK]


def test_turns_follow_each_other_with_all_that_was_said():
    target = FakeTarget()
    ask = text_ask(
        prompt="first", follow_up=text_ask(prompt="second", follow_up=text_ask(prompt="third")), think_s=0.01
    )
    run = driven(target, asks=iter([ask]), offsets=[0.0])
    assert [one.ask.prompt for one in run.outcomes] == ["first", "second", "third"]
    assert [message["content"] for message in target.histories[-1]] == ["first", "one two", "second", "one two"]
    assert run.outcomes[1].scheduled == pytest.approx(run.outcomes[0].end + 0.01)


def test_a_conversation_ends_with_the_first_turn_that_fails():
    ask = text_ask(follow_up=text_ask())
    run = driven(FakeTarget(failure=lambda number: Failed("500")), asks=iter([ask]), offsets=[0.0])
    assert len(run.outcomes) == 1


def test_probes_run_beside_the_load_and_end_with_it():
    probe = text_ask(group="probe")
    run = driven(FakeTarget(seconds=lambda ask: 0.1), offsets=[0.0], probes=repeat(probe), probe_rate=50.0)
    assert {one.group for one in run.outcomes} == {"text", "probe"} and run.ending is Ending.DONE
    assert run.duration_s == max(one.end for one in run.outcomes if one.group == "text")


def test_nothing_but_failures_ends_the_run_and_leaves_what_is_open():
    target = FakeTarget(failure=lambda number: Failed("connect: refused", is_lost=True) if number > 3 else None)
    run = driven(target, num_requests=10_000, max_concurrency=4, lost_after_s=0.3)
    assert run.ending is Ending.LOST and run.last_error == "connect: refused"
    assert len(run.outcomes) < 100 and sum(one.is_ok for one in run.outcomes) == 3


def test_a_server_is_lost_when_failures_last_and_not_before():
    now = [0.0]
    watch = Watch(5.0, lambda: now[0])
    outcomes = driven(
        FakeTarget(failure=lambda number: Failed("500") if number > 1 else None), offsets=[0.0, 0.0]
    ).outcomes
    good, bad = outcomes
    for _ in range(10):
        watch.note(bad)
    assert not watch.is_lost
    now[0] = 6.0
    assert watch.is_lost
    watch.note(good)
    assert not watch.is_lost
    watch.note(bad)
    now[0] = 20.0
    assert not watch.is_lost  # one failure alone says nothing


def test_whoever_has_seen_enough_can_stop_the_run():
    async def scenario() -> Run:
        driver = Driver(FakeTarget(seconds=lambda ask: 30.0), Load(asks=repeat(text_ask()), offsets=[0.0] * 5))
        asyncio.get_running_loop().call_later(0.05, driver.stop, Ending.HOPELESS)
        return await driver()

    run = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert run.ending is Ending.HOPELESS and all(one.status is Status.UNFINISHED for one in run.outcomes)


def test_a_warm_up_that_nobody_answers_says_why():
    target = FakeTarget(failure=lambda number: Failed("404: no such model"))
    with pytest.raises(Failed, match="no such model"):
        asyncio.run(warm_up(target, islice(repeat(text_ask()), 2), 2, 5.0))
