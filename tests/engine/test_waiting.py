"""The waiting queue against a sorted list, and what its policies promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.job import Job
from serve.engine.waiting import AGING_S, WaitingQueue, aged_priority


def arrival(job: Job) -> float:
    return job.arrival


@given(st.lists(st.tuples(st.sampled_from("aaarp"), st.integers(0, 20)), max_size=200))
def test_behaves_like_a_stably_sorted_list(actions):
    queue: WaitingQueue[Job] = WaitingQueue(arrival)
    oracle: list[Job] = []
    for number, (action, value) in enumerate(actions):
        if action == "a":
            job = Job(id=str(number), arrival=float(value))
            queue.add(job)
            oracle.append(job)
        elif action == "r" and oracle:
            job = oracle.pop(value % len(oracle))
            assert queue.remove(job) and job not in queue and not queue.remove(job)
        elif action == "p" and oracle:
            first = min(oracle, key=arrival)
            oracle.remove(first)
            assert queue.pop() is first
        assert queue.peek() is min(oracle, key=arrival, default=None)
        assert len(queue) == len(oracle) and set(queue) == set(oracle)
        assert len(queue._heap) <= 2 * len(oracle) + 17


def test_a_job_that_was_removed_may_come_back():
    queue: WaitingQueue[Job] = WaitingQueue()
    job, other = Job(id="a"), Job(id="b")
    queue.add(job)
    queue.remove(job)
    queue.add(other)
    queue.add(job)
    assert [queue.pop(), queue.pop()] == [other, job]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_level_of_priority_is_worth_a_stated_time_of_waiting():
    queue: WaitingQueue[Job] = WaitingQueue(aged_priority)
    early = Job(id="early", arrival=0.0)
    soon, late = (Job(id=str(t), arrival=t, priority=1) for t in (AGING_S - 1, AGING_S + 1))
    for job in late, early, soon:
        queue.add(job)
    assert [queue.pop().id for _ in range(3)] == [soon.id, early.id, late.id]


def test_nobody_starves_behind_a_stream_of_urgent_jobs():
    queue: WaitingQueue[Job] = WaitingQueue(aged_priority)
    patient = Job(id="patient", arrival=0.0)
    queue.add(patient)
    for second in range(1000):  # as many urgent jobs arrive as are served
        queue.add(Job(id=f"urgent{second}", arrival=float(second), priority=3))
        if queue.pop() is patient:
            break
    assert second == 3 * AGING_S
