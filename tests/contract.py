"""The contract between engine, scheduler and runner, as functions over a run of a random plan.

A `Plan` says who arrives when, who is cancelled, who has a deadline and whose computation fails. A `Scenario` is a
scheduler with its runner, made for one run. `simulate` drives an engine through the plan by hand and returns a `Trace`;
each property is a plain function over the trace, so a new scheduler is tested by writing a scenario:

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize("holds", PROPERTIES)
    @given(plan=plans())
    def test_contract(holds, depth, plan):
        holds(simulate(MyScenario(), plan, depth))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fakes import FakeClock, ListObserver, Saboteur
from hypothesis import strategies as st

from serve.engine.engine import Engine
from serve.engine.job import Job, Status
from serve.engine.stream import Stream
from serve.engine.waiting import aged_priority
from serve.errors import DeadlineExceeded, RequestFailed, TandemError
from serve.events import FinishReason

DEPTHS = (0, 1, 3)
MOST_STEPS = 3000
"""Far more than any plan needs: who takes longer does not get on."""


# -- what is going to happen ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """One job. Times are steps, which are also the clock's seconds."""

    at: int
    size: int
    """Prompt tokens, or the shape."""
    length: int
    """Outputs at most."""
    priority: int
    timeout_s: int | None
    cancelled_after: int | None
    poisoned_at: int | None
    """Fails whenever this output is computed."""


@dataclass(frozen=True)
class Plan:
    arrivals: list[Arrival]
    fails_in: str
    """"submit" or "collect"."""
    glitches: set[int]
    """Batches of several jobs that fail for no reason, once."""
    read_every: int

    @property
    def is_calm(self) -> bool:
        return not self.glitches and all(arrival.poisoned_at is None for arrival in self.arrivals)


def plans(*, most_jobs: int = 10, calm: bool = False) -> st.SearchStrategy[Plan]:
    """`calm`: nothing fails."""
    rarely = st.none() if calm else st.one_of(st.none(), st.none(), st.none(), st.integers(0, 6))
    arrival = st.builds(
        Arrival,
        at=st.integers(0, 20),
        size=st.integers(1, 12),
        length=st.integers(1, 12),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        timeout_s=st.one_of(st.none(), st.none(), st.integers(0, 30)),
        cancelled_after=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)),
        poisoned_at=rarely,
    )
    return st.builds(
        Plan,
        arrivals=st.lists(arrival, min_size=1, max_size=most_jobs),
        fails_in=st.sampled_from(["submit", "collect"]),
        glitches=st.just(set()) if calm else st.sets(st.integers(1, 30), max_size=2),
        read_every=st.integers(1, 5),
    )


class Scenario(Protocol):
    """A scheduler and its runner, fresh for one run, and what is known about them."""

    scheduler: Any
    runner: Any
    saboteur: Saboteur
    max_jobs: int
    max_work: int
    patience: int
    """Batches in a row that a running job may be left out of while nothing fails."""
    is_strict: bool
    """Whether nobody is scheduled for the first time before another one with a smaller key."""

    def job(self, job_id: str, arrival: Arrival) -> Job: ...

    def expected(self, arrival: Arrival) -> list[Any]:
        """All outputs of this job, were it alone and undisturbed, flattened."""
        ...

    def flatten(self, outputs: list[Any]) -> list[Any]:
        """What was read from a stream, in the form of `expected`."""
        ...

    def check_conserved(self) -> None:
        """Assert that free and held resources add up."""
        ...

    def check_all_free(self) -> None:
        """Assert that nothing is held by anybody."""
        ...


# -- what happened -------------------------------------------------------------------------------------------------


@dataclass
class Fate:
    """One job in a run."""

    arrival: Arrival
    job: Job
    stream: Stream[Any]
    outputs: list[Any] = field(default_factory=list)
    error: TandemError | None = None
    cancelled: bool = False


@dataclass
class Trace:
    scenario: Scenario
    plan: Plan
    fates: dict[str, Fate] = field(default_factory=dict)
    batches: list[tuple[list[str], int, list[str], list[str]]] = field(default_factory=list)
    """Of each batch: its jobs, its work, who else was running, who with a smaller key still waits for a first step."""
    finished: list[Job] = field(default_factory=list)
    num_steps: int = 0
    leftovers: list[str] = field(default_factory=list)
    """Jobs without an end when the engine said that there was nothing to do."""


def simulate(scenario: Scenario, plan: Plan, depth: int) -> Trace:
    """Run the plan to its end. Conservation is asserted after every step, as it cannot be seen later."""
    clock, observer, trace = FakeClock(), ListObserver(), Trace(scenario, plan)
    scenario.saboteur.where, scenario.saboteur.glitches = plan.fails_in, set(plan.glitches)
    engine = Engine(_Watched(scenario.scheduler, trace), scenario.runner, depth=depth, observer=observer, clock=clock)
    arrivals = sorted(enumerate(plan.arrivals), key=lambda pair: pair[1].at)
    is_busy = True
    while arrivals or is_busy:
        assert trace.num_steps < MOST_STEPS, f"no end after {MOST_STEPS} steps"
        while arrivals and arrivals[0][1].at <= trace.num_steps:
            number, arrival = arrivals.pop(0)
            job = scenario.job(f"job{number}", arrival)
            if arrival.poisoned_at is not None:
                scenario.saboteur.poison[job.id] = arrival.poisoned_at
            trace.fates[job.id] = Fate(arrival, job, engine.submit(job))
        for fate in trace.fates.values():
            after = fate.arrival.cancelled_after
            if after is not None and trace.num_steps == fate.arrival.at + after:
                fate.cancelled = fate.stream.finish_reason is None
                fate.stream.cancel()
            if trace.num_steps % plan.read_every == 0:
                _read(fate, scenario)
        is_busy = engine.step()
        engine.check_health()
        scenario.check_conserved()
        if not is_busy:
            trace.leftovers += [job_id for job_id, fate in trace.fates.items() if fate.stream.finish_reason is None]
        trace.num_steps += 1
        clock.advance(1.0)
    for fate in trace.fates.values():
        _read(fate, scenario)
        _read(fate, scenario)
    trace.finished = observer.finished
    return trace


def _read(fate: Fate, scenario: Scenario) -> None:
    try:
        fate.outputs += scenario.flatten(fate.stream.take())
    except TandemError as error:
        fate.error = error


class _Watched:
    """A scheduler that writes its batches into the trace."""

    def __init__(self, scheduler: Any, trace: Trace):
        self._scheduler = scheduler
        self._trace = trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def schedule(self, only: Job | None = None) -> Any:
        batch = self._scheduler.schedule(only)
        if batch is not None:
            ids = [job.id for job in batch.jobs]
            jobs = [fate.job for fate in self._trace.fates.values()]
            others = [job.id for job in jobs if job.status is Status.RUNNING and job.id not in ids]
            newcomers = [aged_priority(job) for job in batch.jobs if job.first_scheduled is None]
            passed_over = [
                job.id
                for job in jobs
                if job.id not in ids
                and job.first_scheduled is None
                and not job.is_finished
                and aged_priority(job) < max(newcomers, default=float("-inf"))
            ]
            self._trace.batches.append((ids, batch.num_tokens, others, passed_over))
        return batch


# -- what must hold ------------------------------------------------------------------------------------------------


def progress(trace: Trace) -> None:
    """The engine has nothing to do only when every job has ended."""
    assert trace.leftovers == []


def budget(trace: Trace) -> None:
    """No batch is empty, holds a job twice, or exceeds the limits on jobs and work."""
    for ids, work, _, _ in trace.batches:
        assert 0 < len(ids) == len(set(ids)) <= trace.scenario.max_jobs
        assert 0 < work <= trace.scenario.max_work


def conservation(trace: Trace) -> None:
    """What was held is free again (during the run `simulate` has asserted that free + held = total)."""
    trace.scenario.check_all_free()


def once(trace: Trace) -> None:
    """Every job ends exactly once, for a reason of its own, and its stream agrees."""
    assert sorted(job.id for job in trace.finished) == sorted(trace.fates)
    for job_id, fate in trace.fates.items():
        reason = fate.job.finish_reason
        assert fate.job.status is Status.FINISHED and fate.stream.finish_reason is reason
        match reason:
            case FinishReason.STOP | FinishReason.LENGTH:
                assert fate.error is None
            case FinishReason.CANCELLED:
                assert fate.cancelled and fate.error is None
            case FinishReason.DEADLINE:
                assert fate.arrival.timeout_s is not None and isinstance(fate.error, DeadlineExceeded)
            case FinishReason.ERROR:
                assert job_id in trace.scenario.saboteur.poison and isinstance(fate.error, RequestFailed)


def transparency(trace: Trace) -> None:
    """Outputs are those of the job alone: all of them, or all until it was ended. Only culprits fail."""
    for fate in trace.fates.values():
        expected, poisoned_at = trace.scenario.expected(fate.arrival), fate.arrival.poisoned_at
        assert fate.outputs == expected[: len(fate.outputs)]
        if fate.job.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert fate.outputs == expected
        elif fate.job.finish_reason is FinishReason.ERROR:
            assert poisoned_at is not None and fate.outputs == expected[:poisoned_at]


def fairness(trace: Trace) -> None:
    """While nothing fails: admission in the order of the policy, and running jobs advance within `patience` batches."""
    if not trace.plan.is_calm:
        return
    left_out: dict[str, int] = {}
    for ids, _, others, passed_over in trace.batches:
        if trace.scenario.is_strict:
            assert passed_over == []
        left_out = {job_id: left_out.get(job_id, 0) + 1 for job_id in others if job_id not in ids}
        assert max(left_out.values(), default=0) <= trace.scenario.patience


PROPERTIES: list[Callable[[Trace], None]] = [progress, budget, conservation, once, transparency, fairness]
