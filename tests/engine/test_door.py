"""Who may come in, and when those refused should come back."""

from __future__ import annotations

import pytest

from serve.engine.door import LEAST_RETRY_S, MOST_RETRY_S, Door
from serve.errors import Draining, EngineDead, Overloaded


def retry_after(door: Door, now: float) -> float:
    with pytest.raises(Overloaded) as refusal:
        door.enter("refused", now)
    assert refusal.value.retry_after_s is not None
    return refusal.value.retry_after_s


def fill(door: Door, num_jobs: int, now: float) -> list[str]:
    ids = [f"{now}-{i}" for i in range(num_jobs)]
    for job_id in ids:
        door.enter(job_id, now)
    return ids


def test_the_retry_time_is_the_queues_length_at_the_pace_of_departures():
    door = Door(max_waiting=12)
    first = fill(door, 8, now=0.0)
    for job_id in first:
        door.pass_on(job_id)
    fill(door, 12, now=1.0)
    for number, job_id in enumerate(first):
        door.leave(job_id, 5.0 + number, is_last=False)
    assert retry_after(door, now=12.0) == pytest.approx(12 * 12.0 / 8)
    assert retry_after(door, now=16.0) == pytest.approx(12 * 16.0 / 8)  # nobody has left since: it takes longer


def test_a_slow_start_counts_before_anybody_has_left():
    door = Door(max_waiting=4)
    fill(door, 4, now=0.0)
    assert retry_after(door, now=2.0) == pytest.approx(4 * 2.0)


def test_idle_time_is_no_slowness():
    door = Door(max_waiting=4)
    (only,) = fill(door, 1, now=0.0)
    door.leave(only, 1.0, is_last=True)
    fill(door, 4, now=1000.0)
    assert retry_after(door, now=1000.5) == pytest.approx(4 * 0.5)


def test_the_retry_time_is_bounded():
    door = Door(max_waiting=4)
    fill(door, 4, now=0.0)
    assert retry_after(door, now=0.0) == LEAST_RETRY_S
    assert retry_after(door, now=1e6) == MOST_RETRY_S


def test_a_shut_door_tells_why():
    door = Door(max_waiting=4)
    door.shut(Draining, "closing time")
    with pytest.raises(Draining, match="closing time"):
        door.enter("a", 0.0)
    door.shut(EngineDead, "on fire")
    with pytest.raises(EngineDead, match="on fire"):
        door.enter("a", 0.0)
