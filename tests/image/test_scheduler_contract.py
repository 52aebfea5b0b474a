"""The image scheduler's contract over random plans, on a device that would notice a skipped or repeated operation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contract import DEPTHS, PROPERTIES, Arrival, Trace, plans, simulate
from fakes import Saboteur
from hypothesis import given, settings
from hypothesis import strategies as st
from image_device import SOLVERS, ImageDevice, Output, image_alone, make_scheduler, num_tokens, trajectory

from serve.engine.engine import Engine
from serve.image.trajectory import Trajectory, plan_operations


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[None]:
    """Failures are made on purpose; their tracebacks would be most of the tests' time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Trajectories:
    """More trajectories than slots, more slots than fit into a batch; a few sizes, both solvers, guidance, previews."""

    max_jobs = 5
    max_work = 20
    patience = 4
    is_strict = False  # who has a slot keeps it, though a later, more urgent one may come before its first step

    def __init__(self) -> None:
        self.saboteur = Saboteur()
        self.scheduler = make_scheduler(max_num_images=5, max_num_batched_tokens=self.max_work)
        self.runner = ImageDevice(self.saboteur)

    def job(self, job_id: str, arrival: Arrival) -> Trajectory:
        return trajectory(
            job_id,
            prompt="same for all",
            width=2 * (1 + arrival.size % 3),
            num_steps=arrival.length,
            guidance_scale=4.0 if arrival.size % 2 else 1.0,
            solver=SOLVERS[arrival.length % 2],
            seed=arrival.size,
            num_previews=arrival.size % 4,
            priority=arrival.priority,
            timeout_s=arrival.timeout_s,
        )

    def expected(self, arrival: Arrival) -> list[Output]:
        job = self.job("", arrival)
        job.operations = plan_operations(job.num_steps, job.num_previews)
        return image_alone(job)

    def flatten(self, outputs: list[Any]) -> list[Output]:
        return [(update.step, update.pixels) for update in outputs]

    def check_conserved(self) -> None:
        check_books(self.scheduler)

    def check_all_free(self) -> None:
        assert not self.scheduler._running and not self.scheduler._leaving
        assert self.scheduler.load().tokens_waiting == self.scheduler.load().tokens_owed == 0
        assert not self.runner.states and not self.runner.in_flight


def check_books(scheduler: Any) -> None:
    """Slots are never overdrawn, and the counters behind `load` agree with what they count."""
    assert len(scheduler._running) + sum(scheduler._leaving.values()) <= scheduler.max_num_images
    load = scheduler.load()
    assert load.running == len(scheduler._running) and load.waiting == len(scheduler._waiting)
    assert load.tokens_waiting == sum(job.num_tokens_to_compute for job in scheduler._waiting)
    assert load.tokens_owed == sum(job.num_tokens_owed for job in (*scheduler._waiting, *scheduler._running))
    assert all(job.num_done <= job.num_scheduled <= len(job.operations) for job in scheduler._running)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("holds", PROPERTIES)
@settings(max_examples=15, deadline=None)
@given(plan=plans())
def test_holds_over_random_plans(holds: Callable[[Trace], None], depth: int, plan: Any) -> None:
    holds(simulate(Trajectories(), plan, depth))


@settings(max_examples=100, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(1, 8), st.booleans()), min_size=1, max_size=12
    ),
    depth=st.sampled_from(DEPTHS),
    max_num_images=st.integers(1, 6),
    cap=st.sampled_from([1, 8, 30, 100]),
)
def test_nobody_waits_more_steps_than_there_are_running_trajectories(wanted, depth, max_num_images, cap):
    """Also under a cap that many images exceed alone, with steady arrivals of other sizes."""
    scheduler = make_scheduler(max_num_images=max_num_images, max_num_batched_tokens=cap)
    device = ImageDevice()
    engine = Engine(scheduler, device, depth=depth)
    waited: dict[Trajectory, int] = {}
    step = 0
    streams = []
    while step <= 12 or engine.load().running or engine.load().waiting:
        for i, (arrives, width, num_steps, is_guided) in enumerate(wanted):
            if arrives == step:
                guidance = 2.0 if is_guided else 1.0
                job = trajectory(f"job-{i}", width=2 * width, num_steps=num_steps, guidance_scale=guidance)
                streams.append(engine.submit(job))
        num_batches = len(device.batches)
        engine.step()
        engine.check_health()
        for batch in device.batches[num_batches:]:
            assert batch.num_tokens <= cap or len(batch.rows) == 1
            able = [job for job in scheduler._running if job.num_scheduled < len(job.operations)]
            waited = {job: waited.get(job, 0) + 1 for job in able if job not in batch.jobs}
            assert max(waited.values(), default=0) < max_num_images
        step += 1
        assert step < 3000, "no progress"
    while engine.step():
        pass
    assert all(stream.finish_reason == "stop" for stream in streams)
    assert num_tokens(2, 4) == 2, "the sizes above are meant to straddle the caps"
