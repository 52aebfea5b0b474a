"""A replica that skips equal steps: the step model of `exact.py` without its book-keeping.

Steps with prefill are taken one by one; a run of decode-only steps, which differ in nothing, is one event. So a request
costs about four events, however long its output. The pace that predicts is the one that serves. Left out: the prefix
cache (prompts share nothing) and preemption (an admission holds blocks for the whole output instead). The error against
`exact.py` is stated with the results.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import cast

from loadtest.paced import TextDevice
from loadtest.simulator.replica import ROW, Deliver, Replica, Step, StepRow
from loadtest.simulator.visit import Visit
from loadtest.simulator.world import World
from serve.backend import Load
from serve.errors import Overloaded
from serve.events import FinishReason
from serve.text.pace import TextPace
from serve.text.prefix_digest import PrefixDigest
from serve.text.scheduler import WATERMARK, TokenScheduler
from serve.text.sequence import Sequence, TokenBatch

FED = 4
"""Of a run of equal steps, how many its pace is told: they say little that the first has not."""


@dataclass(slots=True)
class _Prefill:
    visit: Visit
    left: int
    """Behind the step under way."""


# What the pace looks at of a scheduler and a job.


@dataclass(slots=True)
class _Seats:
    max_num_seqs: int
    num_prefix_query_tokens = num_prefix_hit_tokens = 0


@dataclass(slots=True)
class _Ended:
    num_output: int
    finish_reason = FinishReason.LENGTH


class CoarseReplica(Replica):
    """About 50 000 events a second of this machine's time."""

    def __init__(self, replica_id: str, number: int, world: World, device: TextDevice, deliver: Deliver):
        super().__init__(replica_id, number, world, device, deliver)
        self._waiting: deque[Visit] = deque()
        self._prefills: list[_Prefill] = []
        self._decodes: list[tuple[int, int, Visit]] = []
        """(step that gives its last token, serial number, visit), a heap."""
        self._num_steps = self._num_started = 0
        self._num_held = self._num_context = self._num_waiting_tokens = 0
        self._pace = TextPace(cast(TokenScheduler, _Seats(device.max_num_seqs)))
        self._run: tuple[float, float, int] | None = None
        """Of equal steps: when it began, seconds a step, how many."""
        self._offered_s = 0.0
        """As `LoadMeter` adds it up."""
        self._is_idle = True
        self._version = 0
        """Of the one event that is due; older ones are void."""

    @property
    def pace(self) -> TextPace:
        return self._pace

    @property
    def num_jobs(self) -> int:
        return len(self._waiting) + len(self._prefills) + len(self._decodes)

    def load(self) -> Load:
        """As the scheduler counts it: what the step under way computes is no longer owed."""
        num_waiting = len(self._waiting)
        return self.pace.predict(
            Load(
                running=len(self._prefills) + len(self._decodes),
                waiting=num_waiting,
                tokens_waiting=self._num_waiting_tokens,
                memory=self._num_context / self.device.kv_cache_tokens,
                tokens_owed=self._num_waiting_tokens + sum([prefill.left for prefill in self._prefills]),
                offered_s=self._offered_s,
            )
        )

    def digest(self) -> PrefixDigest | None:
        return None

    def cost_s(self, visit: Visit) -> float:
        return visit.num_prompt * self.pace.unit_s + self.pace.job_s

    def accept(self, visit: Visit) -> None:
        if len(self._waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, as many as may", retry_after_s=1.0)
        if self._num_steps:
            self._offered_s += self.cost_s(visit)
        self._waiting.append(visit)
        self._num_waiting_tokens += visit.num_prompt
        if self._is_idle:
            self._is_idle = False
            self._at(self.world.now, self._next)
        elif self._run is not None:
            self._cut()

    def _next(self) -> None:
        """At the end of a step: begin the next one, or a run of equal ones."""
        self._admit()
        num_decodes = len(self._decodes)
        if self._prefills:
            chunks = self._chunks(self.device.max_num_batched_tokens - num_decodes)
            num_rows, num_new = num_decodes + len(chunks), sum([chunk for _, chunk in chunks])
            further = num_new - len(chunks)
            seconds = self.device.step_s(num_rows, further, self._num_context + num_decodes + num_new)
            self.busy_s += seconds
            for prefill, chunk in chunks:
                prefill.left -= chunk
            batch = Step([ROW] * (num_rows - 1) + [StepRow(range(further + 1))])
            self._at(self.world.now + seconds, lambda: self._end_prefill(chunks, batch, seconds))
        elif num_decodes:
            num = self._decodes[0][0] - self._num_steps
            context = self._num_context + num_decodes * (num + 1) // 2
            seconds = self.device.step_s(num_decodes, 0, context)
            self._run = self.world.now, seconds, num
            self._at(self.world.now + num * seconds, lambda: self._end_run(num))
        else:
            self._is_idle = True

    def _admit(self) -> None:
        device = self.device
        while self._waiting:
            visit = self._waiting[0]
            size, num_running = visit.num_prompt + visit.num_output, len(self._prefills) + len(self._decodes)
            room = device.kv_cache_tokens * (1 - WATERMARK if num_running else 1)
            if num_running >= device.max_num_seqs or self._num_held + size > room:
                return
            self._waiting.popleft()
            self._num_waiting_tokens -= visit.num_prompt
            self._num_held += size
            self._prefills.append(_Prefill(visit, visit.num_prompt))

    def _chunks(self, budget: int) -> list[tuple[_Prefill, int]]:
        """Who gets how many positions of the step: what fits whole, else half of what is left; leftovers in order."""
        chunks: list[tuple[_Prefill, int]] = []
        left = budget
        for prefill in self._prefills:
            chunk = prefill.left if prefill.left <= left else (left + 1) // 2
            if chunk:
                chunks.append((prefill, chunk))
                left -= chunk
        given = []
        for prefill, chunk in chunks:
            extra = min(left, prefill.left - chunk)
            left -= extra
            given.append((prefill, chunk + extra))
        return given

    def _end_prefill(self, chunks: list[tuple[_Prefill, int]], batch: Step, seconds: float) -> None:
        self.before_change()
        self.pace.on_step(cast(TokenBatch, batch), seconds)
        self._advance(1)
        for prefill, chunk in chunks:
            self._num_context += chunk
            if not prefill.left:
                self._begin(prefill.visit)
        self._prefills = [prefill for prefill in self._prefills if prefill.left]
        self._next()

    def _begin(self, visit: Visit) -> None:
        """Its prompt is computed, and with it the first token."""
        is_last = visit.num_output == 1
        self.deliver(visit, 1, is_last)
        if is_last:
            self._leave(visit)
        else:
            self._num_started += 1
            heapq.heappush(self._decodes, (self._num_steps + visit.num_output - 1, self._num_started, visit))

    def _end_run(self, num: int) -> None:
        self.before_change()
        assert self._run is not None
        seconds = self._run[1]
        self.busy_s += num * seconds
        self._run = None
        batch = cast(TokenBatch, Step([ROW] * len(self._decodes)))
        for _ in range(min(num, FED)):
            self.pace.on_step(batch, seconds)
        self._advance(num)
        self._next()

    def _cut(self) -> None:
        """End the run of steps with the one that is being computed, for somebody has come."""
        assert self._run is not None
        began, seconds, num = self._run
        done = min(num, int((self.world.now - began) / seconds) + 1)
        self._at(began + done * seconds, lambda: self._end_run(done))

    def _advance(self, num: int) -> None:
        """Every decode gets `num` tokens; none ends before the last of these steps."""
        self._num_steps += num
        self._num_context += num * len(self._decodes)
        while self._decodes and self._decodes[0][0] <= self._num_steps:
            _, _, visit = heapq.heappop(self._decodes)
            self.deliver(visit, visit.num_output - 1, True)
            self._leave(visit)

    def _leave(self, visit: Visit) -> None:
        self.pace.on_finish(cast(Sequence, _Ended(visit.num_output)))
        self._num_held -= visit.num_prompt + visit.num_output
        self._num_context -= visit.num_prompt + visit.num_output - 1

    def _at(self, time_s: float, event) -> None:  # type: ignore[no-untyped-def]
        """The one thing that is to happen next."""
        self._version += 1
        version = self._version

        def guarded() -> None:
            if version == self._version:
                event()

        self.world.at(time_s, guarded)
