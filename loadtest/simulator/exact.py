"""A replica step by step: the scheduler, KV cache, door, load meter and pace that serve, on a device of stated speed.

What the engine does between two steps is taken to be part of the step's time, as it is in a fit of measured steps.
Everything else of `serve/engine/engine.py` is threads and failures, which virtual time does not have.
"""

from __future__ import annotations

from loadtest.paced import TextDevice, answer, text_scheduler
from loadtest.simulator.replica import Deliver, Replica
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World
from serve.backend import Load
from serve.engine.door import Door
from serve.engine.load_meter import LoadMeter
from serve.text.pace import TextPace
from serve.text.prefix_digest import PrefixDigest
from serve.text.sequence import Sequence, TokenBatch


class ExactReplica(Replica):
    """Every step of every sequence. About 20 000 steps a second of this machine's time."""

    def __init__(self, replica_id: str, number: int, world: World, device: TextDevice, deliver: Deliver):
        super().__init__(replica_id, number, world, device, deliver)
        self._scheduler = text_scheduler(device, vocab_size=1 << 31)
        self._pace = TextPace(self._scheduler)
        self._meter = LoadMeter(self._pace)
        self._door = Door(self.max_waiting)
        self._visits: dict[str, Visit] = {}
        self._inbox: list[Sequence] = []
        self._is_idle = True
        self._meter.count(self._scheduler.load())  # an engine's first step, which has nothing to do

    def warm_up(self) -> None:
        super().warm_up()
        self._meter.count(self._scheduler.load())

    @property
    def pace(self) -> TextPace:
        return self._pace

    @property
    def num_jobs(self) -> int:
        return len(self._visits)

    def load(self) -> Load:
        return self._meter.load()

    def digest(self) -> PrefixDigest | None:
        return self._scheduler.kv_cache.digest

    def cost_s(self, visit: Visit) -> float:
        return self._pace.cost_s(_sequence(visit))

    def accept(self, visit: Visit) -> None:
        job = _sequence(visit)
        self._scheduler.validate(job)
        job.arrival = self.world.now
        self._door.enter(job.id, job.arrival)
        self._meter.arrive(job)
        self._visits[job.id] = visit
        self._inbox.append(job)
        if self._is_idle:
            self._is_idle = False
            self.world.at(self.world.now, self._step)

    def _step(self) -> None:
        for job in self._inbox:
            self._scheduler.add(job)
            self._meter.admit(job)
        self._inbox.clear()
        batch = self._scheduler.schedule()
        if batch is None:
            self._is_idle = True
        else:
            launched = self.world.now
            for job in batch.jobs:
                if job.first_scheduled is None:
                    job.first_scheduled = launched
                    self._door.pass_on(job.id)
            self.world.at(launched + self.device.batch_s(batch), lambda: self._settle(batch, launched))
        self._meter.count(self._scheduler.load())

    def _settle(self, batch: TokenBatch, launched: float) -> None:
        self.before_change()
        now = self.world.now
        self.busy_s += now - launched
        self._meter.on_step(batch, launched, now)
        for update in self._scheduler.update(batch, answer(batch)):
            job = update.job
            visit = self._visits[job.id]
            visit.num_cached = job.num_cached
            if update.finish is not None:
                del self._visits[job.id]
                job.finish_reason = update.finish
                self._meter.on_finish(job)
                self._door.leave(job.id, now, is_last=not self._visits)
            num_tokens = 0 if update.output is None else len(update.output.token_ids)
            self.deliver(visit, num_tokens, update.finish is not None)
        self._step()


def _sequence(visit: Visit) -> Sequence:
    request = visit.request
    return Sequence(
        id=request.request_id,
        token_ids=list(request.prompt_token_ids),
        num_prompt=visit.num_prompt,
        sampling=request.sampling,
        cache_salt=request.cache_salt,
    )
