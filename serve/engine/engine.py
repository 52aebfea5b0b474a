"""The engine: one loop that moves jobs through a scheduler and a runner, a batch per step. Read `Engine.step` first.

It owns what every kind of generation has in common (arrival, deadlines, cancellation, failures, streams, draining) and
knows no modality: tokens and latents live behind `Scheduler` and `Runner` (`interface.py`).

Threads. The engine's state belongs to the thread that steps. Others call `submit`, `cancel` and `close`, which leave a
message in the inbox; steps begin by reading it, so everything happens at step boundaries.

Depth. Up to `depth` batches are in flight when a step returns: 0 on CPU, 1 to hide the host behind a GPU, more for
pipeline stages. They are settled in order; schedulers keep track of what is still in flight by epochs.

Failures. A batch whose computation raises is abandoned. A job that was alone is the culprit and gets `RequestFailed`;
of several, each is a suspect and is tried again alone until it fails (the culprit) or yields an output (cleared). After
a conviction the runner proves itself by its canary. What is no job's fault (a lost device, a failed canary, an
exception in the scheduler or here) ends the engine: every stream raises `EngineDead`, nothing goes on half alive.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from serve.backend import Load
from serve.engine.door import Door
from serve.engine.flight import Flight
from serve.engine.interface import B, DeviceFault, J, Observer, Pace, Runner, Scheduler, StepStats
from serve.engine.job import Job, Status
from serve.engine.load_meter import LoadMeter
from serve.engine.pulse import Pulse
from serve.engine.stream import Outbox, Stream
from serve.engine.waiting import WaitingQueue
from serve.errors import DeadlineExceeded, Draining, EngineDead, InvalidRequest, RequestFailed, TandemError
from serve.events import FinishReason

log = logging.getLogger(__name__)

O = TypeVar("O")  # noqa: E741
T = TypeVar("T")


class Engine(Generic[J, B, O]):
    """Runs jobs to their end. `step()` is driven by the thread of `start()`, or by hand in tests and offline."""

    def __init__(
        self,
        scheduler: Scheduler[J, B, O],
        runner: Runner[B, O],
        *,
        depth: int = 0,
        max_waiting: int = 1024,
        step_timeout_s: float = 300.0,
        observer: Observer | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_death: Callable[[BaseException], None] | None = None,
        idle_work: Callable[[], bool] | None = None,
        canary_period_s: float | None = None,
    ):
        """`idle_work` does one small unit of what can wait, and says whether more is left. The engine's thread calls it
        while no job is here and nobody has said anything: a newcomer waits for one unit at most. Its failure is fatal.
        After `canary_period_s` without anything to do the runner has to prove itself, again and again; None: never.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._depth = depth
        self._step_timeout_s = step_timeout_s
        self._canary_period_s = canary_period_s
        self._pulse = Pulse(step_timeout_s, clock)
        self._observer = observer
        self._clock = clock
        self._on_death = on_death
        self._idle_work = idle_work

        self._door = Door(max_waiting)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._streams: dict[str, Stream[J]] = {}
        """Job id → stream, of every accepted job that has not ended."""
        self._deadlines: WaitingQueue[J] = WaitingQueue(_deadline)
        self._in_flight: deque[Flight[J, B]] = deque()
        self._suspects: dict[str, J] = {}
        self._outbox = Outbox()
        self._meter = LoadMeter(pace)

        self._thread: threading.Thread | None = None
        self._is_draining = False
        self._is_closed = False
        self._death: str | None = None
        self._drained: Future[None] = Future()
        self._has_observer_failed = False

    # -- for everybody, on any thread ------------------------------------------------------------------------------

    def submit(self, job: J) -> Stream[J]:
        """Accept `job`, or raise `InvalidRequest`, `Overloaded`, `Draining` or `EngineDead`."""
        self._scheduler.validate(job)
        stream = Stream(job, self.cancel)
        with self._door.lock:
            if job.id in self._streams:
                raise InvalidRequest(f"the job id {job.id!r} is in use; give every request its own", param="request_id")
            job.arrival = self._clock()
            self._door.enter(job.id, job.arrival)
            if not self._streams:
                self._pulse.beat()  # what was done before it came is no measure
            self._streams[job.id] = stream
            self._meter.arrive(job)
            self._inbox.put(partial(self._admit, job))
        return stream

    def cancel(self, job_id: str) -> None:
        """End this job at the next step boundary, unless it has ended by then."""
        self._inbox.put(partial(self._cancel, job_id, self._clock()))

    @property
    def scheduler(self) -> Scheduler[J, B, O]:
        """For those who read its counters; only the engine's thread may call it."""
        return self._scheduler

    def load(self) -> Load:
        """As of the last step; what came in since counts as waiting."""
        return self._meter.load()

    def check_health(self) -> None:
        """Raise `EngineDead` when the engine has died or does not go forward (`Pulse`)."""
        if self._death is not None:
            raise EngineDead(self._death)
        self._pulse.check(has_jobs=bool(self._streams))
        if self._thread is not None and not self._thread.is_alive() and not self._is_closed:
            raise EngineDead("the engine's thread has ended")

    def start(self) -> None:
        """Step in a thread of its own from now on."""
        assert self._thread is None, "the engine is started twice"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new jobs; return when the accepted ones have ended, or `timeout_s` later."""
        self._refuse_newcomers()
        self._inbox.put(self._check_drained)
        await asyncio.wait([asyncio.wrap_future(self._drained)], timeout=timeout_s)

    def close(self) -> None:
        """Refuse new jobs, end the unfinished ones with `Draining`, end the thread. Any number of times."""
        self._refuse_newcomers()
        self._inbox.put(self._stop)
        if self._thread is None:
            while self.step():
                pass
        elif self._thread is not threading.current_thread():
            self._thread.join(self._step_timeout_s)

    # -- the loop --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Advance by one step; False when there is nothing to do."""
        if self._death is not None:
            return False
        try:
            self._pulse.begin("a step")
            self._receive()
            self._expire(self._clock())
            batch = self._schedule()
            if batch is not None:
                self._launch(batch)
            is_idle = batch is None and not self._in_flight
            if self._in_flight and (batch is None or len(self._in_flight) > self._depth):
                self._settle(self._in_flight.popleft())
            self._outbox.flush()
            self._meter.count(self._scheduler.load())
            return not is_idle
        except Exception as error:
            self._die(error)
            return False
        finally:
            self._pulse.rest()

    def use_idle_time(self) -> bool:
        """Do one unit of idle work; False when there is none, or somebody waits. Called where `step` is."""
        if self._idle_work is None or not self._inbox.empty():
            return False
        self._pulse.begin("a unit of idle work")
        if not self._idle_work():
            self._idle_work = None
        self._pulse.rest()
        return True

    def prove(self) -> None:
        """Have the runner compute its canary: a device that was lost while nobody asked is found before somebody does.
        No job, no block of the cache and no metric of requests knows of it. Raises what is wrong."""
        began = self._clock()
        self._pulse.begin("the canary")
        self._runner.check()
        self._pulse.rest()
        if self._observer is not None:
            self._tell(self._observer.on_canary, self._clock() - began)

    def _run(self) -> None:
        try:
            while True:
                if not self.step():
                    if self._is_closed:
                        return
                    if not self.use_idle_time():
                        self._sleep()
        except BaseException as error:
            self._die(error)

    def _sleep(self) -> None:
        """Until somebody says something, or a canary is due."""
        try:
            message = self._inbox.get(timeout=self._canary_period_s)
        except Empty:
            self.prove()
        else:
            message()

    def _receive(self) -> None:
        """New jobs and cancellations."""
        while not self._inbox.empty():
            self._inbox.get()()

    def _expire(self, now: float) -> None:
        """End the jobs whose deadline has passed, before any work is spent on them."""
        while (job := self._deadlines.peek()) is not None and _deadline(job) <= now:
            where = "in the queue" if job.first_scheduled is None else "while it was computed"
            message = f"the request's deadline of {job.timeout_s:g} s passed {where}; allow more time, or retry later"
            self._remove(job, FinishReason.DEADLINE, DeadlineExceeded(message))

    def _schedule(self) -> B | None:
        if not self._suspects:
            return self._scheduler.schedule()
        if self._in_flight:
            return None  # alone means alone on the device too
        suspect = next(iter(self._suspects.values()))
        batch = self._scheduler.schedule(only=suspect)
        assert batch is not None and batch.jobs == [suspect], f"job {suspect.id!r} cannot be scheduled alone"
        return batch

    def _launch(self, batch: B) -> None:
        now = self._clock()
        jobs: list[J] = batch.jobs
        for job in jobs:
            if job.first_scheduled is None:
                job.first_scheduled = now
                self._door.pass_on(job.id)
        for job in jobs if batch.stage else ():
            job.enter(batch.stage, now)
        flight = Flight(batch, jobs, now, is_alone=len(jobs) == 1 and not self._in_flight)
        try:
            flight.handle = self._runner.submit(batch)
        except DeviceFault:
            raise
        except Exception as error:
            while self._in_flight:  # in order, also now
                self._settle(self._in_flight.popleft())
            self._contain(flight, error)
        else:
            self._in_flight.append(flight)

    def _settle(self, flight: Flight[J, B]) -> None:
        """Take in a batch's result, or its failure."""
        try:
            output = self._runner.collect(flight.handle)
        except DeviceFault:
            raise
        except Exception as error:
            self._contain(flight, error)
        else:
            self._publish(flight, output)
        self._pulse.beat()
        for job_id in flight.departed:
            self._runner.release(job_id)

    def _publish(self, flight: Flight[J, B], output: O) -> None:
        now = self._clock()
        self._meter.on_step(flight.batch, flight.launched, now)
        for update in self._scheduler.update(flight.batch, output):
            job = update.job
            if update.output is not None:
                self._outbox.put(self._streams[job.id], update.output)
                if job.first_output is None:
                    job.first_output = now
                if self._suspects:
                    self._suspects.pop(job.id, None)
            if update.finish is not None:
                self._end(job, update.finish, update.error)
        if self._observer is not None:
            batch = flight.batch
            stats = StepStats(now - flight.launched, len(flight.jobs), batch.num_tokens, batch.stage, batch.num_rows)
            self._tell(self._observer.on_step, stats)

    # -- failures --------------------------------------------------------------------------------------------------

    def _contain(self, flight: Flight[J, B], error: Exception) -> None:
        """The batch failed: convict the job that was alone, or suspect each of several."""
        self._scheduler.abandon(flight.batch)
        jobs = [job for job in flight.jobs if not job.is_finished]
        ids = ",".join(job.id for job in jobs)
        log.error("batch failed is_alone=%s jobs=%s", flight.is_alone, ids, exc_info=error)
        if not flight.is_alone:
            self._suspects.update((job.id, job) for job in jobs)
            return
        for job in jobs:
            message = f"computing this request failed ({type(error).__name__}); the server's log has the details"
            self._remove(job, FinishReason.ERROR, RequestFailed(message))
        self._runner.check()

    def _die(self, cause: BaseException) -> None:
        """End everything now: nothing here can be trusted any more."""
        if self._death is not None:
            return
        log.critical("engine died", exc_info=cause)
        self._death = f"the engine has died ({type(cause).__name__}) and its process ends; send the request again"
        self._door.shut(EngineDead, self._death)
        for stream in list(self._streams.values()):
            self._conclude(stream.job, FinishReason.ERROR, EngineDead(self._death))
        self._outbox.flush()
        self._is_draining = self._is_closed = True
        self._check_drained()
        if self._on_death is not None:
            self._on_death(cause)

    # -- a job's beginning and end ---------------------------------------------------------------------------------

    def _admit(self, job: J) -> None:
        self._scheduler.add(job)
        self._meter.admit(job)
        if job.timeout_s is not None:
            self._deadlines.add(job)

    def _cancel(self, job_id: str, asked: float) -> None:
        stream = self._streams.get(job_id)
        if stream is not None:
            stream.job.cancelled = asked
            self._remove(stream.job, FinishReason.CANCELLED)

    def _remove(self, job: J, reason: FinishReason, error: TandemError | None = None) -> None:
        """End a job that the scheduler has not ended itself."""
        self._scheduler.remove(job)
        self._end(job, reason, error)

    def _end(self, job: J, reason: FinishReason, error: TandemError | None = None) -> None:
        self._conclude(job, reason, error)
        self._suspects.pop(job.id, None)
        self._deadlines.remove(job)
        self._door.leave(job.id, self._clock(), is_last=not self._streams)
        if self._in_flight:
            self._in_flight[-1].departed.append(job.id)
        else:
            self._runner.release(job.id)
        self._check_drained()

    def _conclude(self, job: J, reason: FinishReason, error: TandemError | None = None) -> None:
        """What others see of an end."""
        job.status = Status.FINISHED
        job.finish_reason = reason
        job.finished = self._clock()
        self._outbox.end(self._streams.pop(job.id), reason, error)
        self._meter.on_finish(job)
        if self._observer is not None:
            self._tell(self._observer.on_finish, job)

    # -- shutting down, and those who watch ------------------------------------------------------------------------

    def _refuse_newcomers(self) -> None:
        self._is_draining = True
        if self._death is None:
            self._door.shut(Draining, "the server is shutting down and takes nothing new; send the request elsewhere")

    def _stop(self) -> None:
        for stream in list(self._streams.values()):
            error = Draining("the server shut down before this request was finished; send it again")
            self._remove(stream.job, FinishReason.ERROR, error)
        self._is_closed = True

    def _check_drained(self) -> None:
        if self._is_draining and not self._streams and not self._drained.done():
            self._drained.set_result(None)

    def _tell(self, hear: Callable[[T], None], what: T) -> None:
        """An observer's failure is its own. Logged once, as it would repeat every step."""
        try:
            hear(what)
        except Exception:
            if not self._has_observer_failed:
                self._has_observer_failed = True
                log.exception("observer failed")


def _deadline(job: Job) -> float:
    assert job.timeout_s is not None
    return job.arrival + job.timeout_s
