"""What the engine does with one job or two: the rules one by one, on an engine that is stepped by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes import (
    FakeClock,
    FakeTokenRunner,
    FakeTokenScheduler,
    ListObserver,
    Saboteur,
    continuation,
    sequence,
)

from serve.engine.engine import Engine
from serve.engine.interface import DeviceFault, Update
from serve.engine.job import Job
from serve.engine.stream import Stream
from serve.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    InvalidRequest,
    Overloaded,
    RequestFailed,
    TandemError,
)
from serve.events import FinishReason


class Bench:
    """An engine over fakes, with everything around it within reach."""

    def __init__(self, **options: Any):
        self.clock = FakeClock()
        self.observer = ListObserver()
        self.saboteur = Saboteur()
        self.scheduler = FakeTokenScheduler(num_cells=200, max_num_seqs=8, max_num_batched_tokens=16)
        self.runner = FakeTokenRunner(saboteur=self.saboteur)
        self.deaths: list[BaseException] = []
        options = {"observer": self.observer, "clock": self.clock, "on_death": self.deaths.append, **options}
        self.engine: Engine[Any, Any, Any] = Engine(self.scheduler, self.runner, **options)

    def submit(self, job_id: str = "a", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8, **job: Any) -> Stream:
        return self.engine.submit(sequence(job_id, prompt, max_tokens, ignore_eos=True, **job))

    def run(self) -> None:
        while self.engine.step():
            self.clock.advance(1.0)


def tokens(stream: Stream) -> list[int]:
    return [token for output in stream.take() for token in output.token_ids]


def undisturbed(prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8) -> list[int]:
    return continuation(prompt, max_tokens, ignore_eos=True)


# -- idle time -----------------------------------------------------------------------------------------------------


def test_idle_work_is_done_in_units_until_none_is_left_and_a_newcomer_waits_for_one():
    order: list[str] = []
    done = threading.Event()

    class Watcher(ListObserver):
        def on_finish(self, job: Job) -> None:
            order.append(job.id)

    def unit() -> bool:
        order.append("unit")
        if len(order) == 2:
            bench.submit("newcomer")  # while this unit is under way
        is_last = order.count("unit") == 4
        if is_last:
            done.set()
        return not is_last

    bench = Bench(idle_work=unit, observer=Watcher())
    bench.engine.start()
    assert done.wait(10)
    bench.engine.close()
    assert order == ["unit", "unit", "newcomer", "unit", "unit"]


def test_a_failure_of_idle_work_ends_the_engine():
    ended = threading.Event()

    def unit() -> bool:
        raise DeviceFault("lost")

    engine = Bench(idle_work=unit, on_death=lambda cause: ended.set()).engine
    engine.start()
    assert ended.wait(10)
    with pytest.raises(EngineDead):
        engine.check_health()


# -- canaries ------------------------------------------------------------------------------------------------------


def test_an_idle_engine_proves_itself_again_and_again_and_no_job_or_step_is_counted_for_it():
    proofs, ended = threading.Semaphore(0), threading.Event()

    class Watcher(ListObserver):
        def on_canary(self, duration_s: float) -> None:
            proofs.release()

        def on_finish(self, job: Job) -> None:
            ended.set()

    bench = Bench(canary_period_s=0.001, observer=(observer := Watcher()))
    before = bench.engine.load()
    bench.engine.start()
    assert all(proofs.acquire(timeout=10) for _ in range(3))
    assert observer.steps == observer.finished == [] and bench.engine.load() == before
    stream = bench.submit()
    assert ended.wait(10)
    assert tokens(stream) == undisturbed()
    assert all(proofs.acquire(timeout=10) for _ in range(2))
    bench.engine.close()


def test_a_canary_that_fails_ends_the_engine():
    ended = threading.Event()
    bench = Bench(canary_period_s=0.001, on_death=lambda cause: ended.set())
    bench.saboteur.is_device_lost = True
    bench.engine.start()
    assert ended.wait(10)
    with pytest.raises(EngineDead):
        bench.submit()
    assert bench.observer.canaries == []


def test_a_canary_that_hangs_makes_the_engine_unhealthy(monkeypatch):
    hangs, may_return = threading.Event(), threading.Event()

    def check() -> None:
        hangs.set()
        may_return.wait(10)

    bench = Bench(canary_period_s=0.001, step_timeout_s=10.0)
    monkeypatch.setattr(bench.runner, "check", check)
    bench.engine.start()
    assert hangs.wait(10)
    bench.engine.check_health()
    bench.clock.advance(11.0)
    with pytest.raises(EngineDead, match=r"the canary .*\(step_timeout_s\)"):
        bench.engine.check_health()
    may_return.set()
    bench.engine.close()


def test_a_busy_engine_computes_no_canary():
    bench = Bench(canary_period_s=0.001)
    bench.submit(max_tokens=8)
    bench.run()
    assert bench.observer.canaries == [] and bench.saboteur.num_checks == 0


# -- life ----------------------------------------------------------------------------------------------------------


def test_a_job_runs_to_its_end():
    bench = Bench()
    stream = bench.submit()
    bench.run()
    assert tokens(stream) == undisturbed()
    assert stream.finish_reason is FinishReason.LENGTH
    assert stream.take() == []


def test_times_of_a_job_are_the_engines_clock():
    bench = Bench()
    stream = bench.submit(prompt=(1,) * 20, max_tokens=3)  # two chunks of prefill
    bench.clock.advance(5.0)
    bench.run()
    job = stream.job
    assert (job.arrival, job.first_scheduled, job.first_output, job.finished) == (1000.0, 1005.0, 1006.0, 1008.0)


def test_nothing_to_do_is_told():
    bench = Bench()
    assert not bench.engine.step()
    bench.submit(max_tokens=1)
    assert bench.engine.step()
    assert not bench.engine.step()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_as_many_batches_as_the_depth_are_in_flight_after_a_step(depth):
    bench = Bench(depth=depth)
    bench.submit(max_tokens=20)
    for _ in range(depth + 1):
        bench.engine.step()
    assert len(bench.runner.in_flight) == depth


def test_a_job_that_can_never_run_is_refused_at_the_door():
    bench = Bench()
    with pytest.raises(InvalidRequest, match="do not fit"):
        bench.submit(max_tokens=500)
    assert not bench.engine.step()


def test_a_job_id_in_use_is_refused():
    bench = Bench()
    bench.submit("a")
    with pytest.raises(InvalidRequest, match="'a'"):
        bench.submit("a")
    bench.run()
    bench.submit("a")


# -- cancel and deadlines ------------------------------------------------------------------------------------------


def test_a_cancelled_job_ends_at_the_next_step_boundary():
    bench = Bench()
    stream = bench.submit()
    bench.engine.step()
    bench.engine.cancel("a")
    assert stream.finish_reason is None
    bench.engine.step()
    assert stream.finish_reason is FinishReason.CANCELLED
    assert len(bench.scheduler.free) == bench.scheduler.num_cells
    assert tokens(stream) == undisturbed()[:1]


def test_cancelling_needs_no_care():
    bench = Bench()
    stream = bench.submit()
    for _ in range(3):
        stream.cancel()
        bench.engine.cancel("a")
        bench.engine.cancel("nobody")
        bench.run()
    assert [job.id for job in bench.observer.finished] == ["a"]


def test_a_job_cancelled_before_its_first_step_costs_no_work():
    bench = Bench()
    bench.submit().cancel()
    bench.run()
    assert bench.observer.steps == []


def test_what_is_in_flight_for_a_cancelled_job_is_dropped():
    bench = Bench(depth=3)
    cancelled, other = bench.submit("a"), bench.submit("b")
    for _ in range(4):
        bench.engine.step()
    cancelled.cancel()
    bench.engine.step()
    num_read = len(tokens(cancelled))
    bench.run()
    assert num_read == 1 and tokens(cancelled) == []
    assert tokens(other) == undisturbed()
    assert len(bench.scheduler.free) == bench.scheduler.num_cells


def test_tensors_are_released_when_no_batch_in_flight_uses_them():
    bench = Bench(depth=1)
    stream = bench.submit()
    bench.engine.step()
    bench.engine.step()
    assert "a" in bench.runner.sampled
    stream.cancel()
    bench.engine.step()
    assert bench.runner.sampled == {} and bench.runner.in_flight == []


def test_a_deadline_ends_a_running_job():
    bench = Bench()
    stream = bench.submit(timeout_s=2.5)
    bench.run()
    assert tokens(stream) == undisturbed()[:3]
    with pytest.raises(DeadlineExceeded, match=r"2\.5 s passed while it was computed"):
        stream.take()
    assert stream.finish_reason is FinishReason.DEADLINE


def test_a_deadline_ends_a_queued_job_before_any_work_is_spent_on_it():
    bench = Bench()
    stream = bench.submit(timeout_s=2.0)
    bench.clock.advance(2.0)
    bench.run()
    assert bench.observer.steps == []
    with pytest.raises(DeadlineExceeded, match="in the queue"):
        stream.take()


# -- bounds --------------------------------------------------------------------------------------------------------


def test_jobs_beyond_the_bound_on_waiting_are_refused():
    bench = Bench(max_waiting=2)
    bench.submit("a")
    bench.submit("b")
    with pytest.raises(Overloaded):
        bench.submit("c")
    bench.engine.step()  # a and b are scheduled: nobody waits
    bench.submit("c")


def test_a_job_cancelled_in_the_queue_makes_room():
    bench = Bench(max_waiting=1)
    bench.submit("a").cancel()
    bench.engine.step()
    bench.submit("b")


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["submit", "collect"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_mates_of_a_poisoned_job_get_the_tokens_they_would_have_had(depth, where):
    bench = Bench(depth=depth)
    bench.saboteur.where = where
    bench.saboteur.poison["culprit"] = 3
    mates = [bench.submit(f"mate{i}", prompt=(i, 2, 3)) for i in range(3)]
    culprit = bench.submit("culprit")
    bench.run()
    assert [tokens(mate) for mate in mates] == [undisturbed((i, 2, 3)) for i in range(3)]
    assert tokens(culprit) == undisturbed()[:3]
    with pytest.raises(RequestFailed, match="RuntimeError"):
        culprit.take()
    assert bench.saboteur.num_checks == 1
    bench.engine.check_health()


def test_a_job_alone_in_a_failing_batch_is_convicted_at_once():
    bench = Bench()
    bench.saboteur.poison["a"] = 0
    stream = bench.submit()
    bench.engine.step()
    assert stream.finish_reason is FinishReason.ERROR


def test_suspects_run_alone_and_others_wait_for_their_steps_only():
    bench = Bench()
    bench.saboteur.glitches = {2}
    streams = [bench.submit(name) for name in "abc"]
    bench.engine.step()
    bench.engine.step()  # fails
    sizes = []
    for _ in range(4):
        bench.engine.step()
        sizes.append(bench.observer.steps[-1].num_jobs)
    assert sizes == [1, 1, 1, 3]
    bench.run()
    assert [tokens(stream) for stream in streams] == [undisturbed()] * 3
    assert bench.saboteur.num_checks == 0


def test_a_suspect_stays_on_trial_until_it_yields_an_output():
    bench = Bench()
    bench.saboteur.glitches = {1}
    short, long = bench.submit("short"), bench.submit("long", prompt=(1,) * 40)
    bench.run()
    # after the glitch: short alone, three chunks of long's prompt alone, then both together
    assert [(stats.num_jobs, stats.num_tokens) for stats in bench.observer.steps[:5]] == [
        (1, 3),
        (1, 16),
        (1, 16),
        (1, 8),
        (2, 2),
    ]
    assert (tokens(short), tokens(long)) == (undisturbed(), undisturbed((1,) * 40))


def test_jobs_that_fail_only_together_all_finish():
    bench = Bench()
    bench.saboteur.quarrels = {frozenset({"a", "b"})}
    a, b, c = (bench.submit(name) for name in "abc")
    bench.run()
    assert [tokens(stream) for stream in (a, b, c)] == [undisturbed()] * 3


def test_a_cancelled_suspect_is_forgotten():
    bench = Bench()
    bench.saboteur.glitches = {1}
    a, b = bench.submit("a"), bench.submit("b")
    bench.engine.step()
    a.cancel()
    bench.run()
    assert a.finish_reason is FinishReason.CANCELLED and tokens(b) == undisturbed()


def dead_by_canary(bench: Bench) -> None:
    bench.saboteur.is_device_lost = True
    bench.saboteur.poison["a"] = 1


def dead_by_device(bench: Bench) -> None:
    bench.saboteur.error = DeviceFault
    bench.saboteur.poison["a"] = 1


def dead_by_scheduler(bench: Bench) -> None:
    def update(batch: Any, output: Any) -> list[Update[Any]]:
        raise ZeroDivisionError("a bug")

    bench.scheduler.update = update  # type: ignore[method-assign]


@pytest.mark.parametrize("kill", [dead_by_canary, dead_by_device, dead_by_scheduler])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_failure_that_is_no_jobs_ends_everything(kill: Callable[[Bench], None], depth):
    bench = Bench(depth=depth)
    kill(bench)
    streams = [bench.submit("a"), bench.submit("b")]
    bench.run()
    for stream in streams[1:] if kill is dead_by_canary else streams:
        with pytest.raises(EngineDead):
            for _ in range(9):
                stream.take()
        assert stream.finish_reason is FinishReason.ERROR
    assert len(bench.deaths) == 1
    assert sorted(job.id for job in bench.observer.finished) == ["a", "b"]
    with pytest.raises(EngineDead):
        bench.submit("c")
    with pytest.raises(EngineDead):
        bench.engine.check_health()
    assert not bench.engine.step()


def test_a_step_that_hangs_makes_the_engine_unhealthy():
    bench = Bench(step_timeout_s=10.0)
    compute, seen = bench.runner.collect, list[str]()

    def collect(handle: Any) -> Any:
        for _ in range(2):
            bench.clock.advance(6.0)
            try:
                bench.engine.check_health()
                seen.append("healthy")
            except EngineDead as error:
                seen.append(error.message)
        return compute(handle)

    bench.runner.collect = collect  # type: ignore[method-assign]
    bench.submit()
    bench.engine.step()
    assert seen == ["healthy", "a step has been running for more than 10 s (step_timeout_s)"]
    bench.engine.check_health()


def test_work_of_which_no_step_is_completed_makes_it_unhealthy_though_steps_come_and_go(monkeypatch):
    bench = Bench(step_timeout_s=10.0)
    bench.clock.advance(1000.0)  # idle for long: nothing to hold against it
    bench.engine.check_health()
    bench.submit()
    monkeypatch.setattr(bench.scheduler, "schedule", lambda only=None: None)
    for _ in range(2):
        bench.engine.check_health()
        bench.engine.step()
        bench.clock.advance(6.0)
    with pytest.raises(EngineDead, match="no step has been completed"):
        bench.engine.check_health()


def test_a_failing_observer_fails_no_job(caplog):
    class BrokenObserver:
        def on_step(self, stats: Any) -> None:
            raise OSError("disk full")

        on_finish = on_step

    bench = Bench(observer=BrokenObserver())
    stream = bench.submit()
    bench.run()
    assert tokens(stream) == undisturbed()
    assert caplog.text.count("observer failed") == 1


# -- what is watched -----------------------------------------------------------------------------------------------


def test_the_load_follows_arrivals_and_cancellations():
    bench = Bench()
    stream = bench.submit()
    assert bench.engine.load().waiting == 1
    bench.engine.step()
    assert (bench.engine.load().running, bench.engine.load().waiting) == (1, 0)
    stream.cancel()
    bench.engine.step()
    assert bench.engine.load().running == 0


def test_a_step_is_measured_from_submit_to_settled():
    bench = Bench(depth=1)
    bench.submit(prompt=(1, 2, 3, 4))
    bench.engine.step()
    bench.clock.advance(0.25)
    bench.engine.step()
    (stats,) = bench.observer.steps
    assert (stats.duration_s, stats.num_jobs, stats.num_tokens) == (0.25, 1, 4)


# -- shutting down -------------------------------------------------------------------------------------------------


def test_draining_refuses_newcomers_and_waits_for_the_others():
    bench = Bench()
    stream = bench.submit()

    async def drain() -> None:
        draining = asyncio.create_task(bench.engine.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            bench.submit("b")
        while bench.engine.step():
            assert not draining.done()
        await draining

    asyncio.run(drain())
    assert tokens(stream) == undisturbed()


def test_draining_gives_up_after_its_time():
    bench = Bench()
    stream = bench.submit()
    asyncio.run(bench.engine.drain(0.01))
    assert stream.finish_reason is None


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_closing_ends_what_is_unfinished(depth):
    bench = Bench(depth=depth)
    streams = [bench.submit("a"), bench.submit("b", max_tokens=1)]
    for _ in range(depth + 1):
        bench.engine.step()
    for _ in range(2):
        bench.engine.close()
    assert tokens(streams[0]) == undisturbed()[:1]
    with pytest.raises(Draining, match="shut down"):
        streams[0].take()
    assert streams[1].finish_reason is FinishReason.LENGTH
    assert len(bench.scheduler.free) == bench.scheduler.num_cells
    with pytest.raises(Draining):
        bench.submit("c")


def test_the_thread_serves_many_submitters_and_ends():
    bench = Bench(max_waiting=1000)
    bench.engine.start()
    results: dict[str, list[int]] = {}

    async def client(name: str) -> None:
        stream = bench.submit(name, prompt=(len(name), 2))
        results[name] = [token async for outputs in stream for output in outputs for token in output.token_ids]

    async def clients(prefix: str) -> None:
        await asyncio.gather(*(client(f"{prefix}{i}") for i in range(20)))

    threads = [threading.Thread(target=lambda prefix=prefix: asyncio.run(clients(prefix))) for prefix in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    bench.engine.close()
    assert len(results) == 60
    assert all(outputs == undisturbed((len(name), 2)) for name, outputs in results.items())
    bench.engine.check_health()


def test_a_death_in_the_thread_reaches_readers():
    bench = Bench()
    dead_by_device(bench)
    bench.engine.start()

    async def read() -> TandemError:
        try:
            async for _ in bench.submit():
                pass
        except TandemError as error:
            return error
        raise AssertionError("the stream ended as if nothing had happened")

    assert isinstance(asyncio.run(read()), EngineDead)
    bench.engine.close()
    with pytest.raises(EngineDead):
        bench.engine.check_health()
