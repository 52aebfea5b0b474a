"""How many replicas a model needs, from what its replicas report. Pure: the caller brings signals and time.

Each replica reports, over the last `look_back_period_s`: the *work* offered to it, in seconds of its device per second
(what was accepted and what was refused for want of room); the *wait* predicted for a newcomer; the use of its cache
memory; and the share of the time in which a newcomer would have waited longer than `target_wait_s`, which stands in
for the share of requests that break the target. With W the sum of the work, the model needs at least

    work      W / target_utilization
    memory    sum of memory / target_kv_cache_usage
    backlog   W + sum of (wait - target_wait_s, where above it) / max(target_wait_s, load time of a replica)
    late      a tenth more than there are, at least one, where the attainment is below its target and every replica that
              was asked for has been up for `look_back_period_s`: it corrects what the three above got wrong
    held      one, where requests wait at a gateway for a first replica

The work of a constant load does not depend on how many replicas share it, so neither does what it needs: unlike a rule
on the queue's length, this one does not find its own success a reason to undo it. The backlog is a passing term, what
is over the target worked off in the time in which a replica can come at all.

*Up* when more has been needed for `upscale_delay_s`, at once from zero, and to all that is needed: not step by step.
*Down* when fewer have been enough all through `downscale_delay_s`, which is never less than the load time of a
replica, and to the most that were enough in that time. Enough is more than needed: the targets are `SLACK` lower, and
n replicas are enough for the wait only if, as in a queue at utilization u = W / n, where the wait goes as u / (1 - u),

    wait now x (ready - W) / (n - W)

stays in the target. While a replica that is up says nothing, there is no step down. To zero only from one, after
`downscale_to_zero_delay_s` with no work at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from serve.options import AutoscalingOptions

SLACK = 0.9
"""Of each target, on the way down: loads within a tenth of each other ask for the same number, up and down."""
DOWNSCALE_DELAY_S = 60.0
"""Where none is stated, or twice the load time of a replica if that is more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signals:
    """What one replica reports, averaged over `look_back_period_s`."""

    work: float = 0.0
    """Predicted seconds of its device for what was offered in a second, accepted or refused for want of room."""
    wait_s: float = 0.0
    """Predicted for a newcomer (`Load.backlog_s`)."""
    memory: float = 0.0
    """Share of its cache memory in use."""
    late: float = 0.0
    """Share of the time in which a newcomer would have waited longer than `target_wait_s`."""
    jobs: float = 0.0
    """Running and waiting."""
    load_s: float = 0.0
    """How long it took to come up."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be."""

    num_replicas: int
    reason: str
    """The term that decided (see the module); "steady" while it stays as it is, "idle" on the way down."""


class Autoscaler:
    """The rule, and since when more were needed or fewer enough. One per model; a new one only waits anew."""

    def __init__(self, options: AutoscalingOptions):
        self._options = options
        self._short_since: float | None = None
        self._ample_since: float | None = None
        self._most_enough = 0
        """Of the numbers that were enough since then."""
        self._complete_since: float | None = None
        """Since when as many replicas as were asked for are up."""

    def decide(
        self, signals: Sequence[Signals], *, num_target: int, num_ready: int, num_held: int = 0, now: float
    ) -> Decision:
        """`num_target` replicas were asked for, `num_ready` of them are up and `signals` has what they reported;
        `num_held` requests wait at gateways for a first one."""
        options = self._options
        if num_target < options.min_replicas or num_target > options.max_replicas:
            self._reset()
            return Decision(min(max(num_target, options.min_replicas), options.max_replicas), "bounds")
        if num_ready != num_target:
            self._complete_since = None
        elif self._complete_since is None:
            self._complete_since = now
        needed, reason = self._needed(signals, num_target, num_ready, num_held, now)
        needed = min(needed, options.max_replicas)
        if needed > num_target:
            return self._up(needed, reason, num_target, now)
        self._short_since = None
        if num_ready and num_ready == len(signals) and not num_held:
            return self._down(signals, num_target, now)
        self._ample_since = None
        return Decision(num_target, "steady")

    def _needed(
        self, signals: Sequence[Signals], num_target: int, num_ready: int, num_held: int, now: float
    ) -> tuple[int, str]:
        options = self._options
        terms = {"held": 1.0 if num_held else 0.0}
        if signals:
            work = sum(one.work for one in signals)
            over_s = sum(max(0.0, one.wait_s - options.target_wait_s) for one in signals)
            terms["work"] = work / options.target_utilization
            terms["memory"] = sum(one.memory for one in signals) / options.target_kv_cache_usage
            terms["backlog"] = work + over_s / max(options.target_wait_s, _load_s(signals)) if over_s else 0.0
            if self._is_late(signals, now):
                terms["late"] = num_ready + max(1.0, num_ready / 10)
        reason = max(terms, key=lambda name: terms[name])
        return _ceil(terms[reason]), reason

    def _is_late(self, signals: Sequence[Signals], now: float) -> bool:
        """Whether the attainment says so: once replicas that came up have been there for as long as it looks back."""
        since, period_s = self._complete_since, self._options.look_back_period_s
        is_settled = since is not None and now - since >= period_s
        return is_settled and fmean(one.late for one in signals) > 1 - self._options.target_attainment

    def _up(self, needed: int, reason: str, num_target: int, now: float) -> Decision:
        self._ample_since = None
        if self._short_since is None:
            self._short_since = now
        if num_target and now - self._short_since < self._options.upscale_delay_s:
            return Decision(num_target, "steady")
        self._reset()
        return Decision(needed, reason)

    def _down(self, signals: Sequence[Signals], num_target: int, now: float) -> Decision:
        """With the signals of all that are up. Those that are still to come, or never do, count only as asked for."""
        enough = max(self._enough(signals), self._options.min_replicas)
        if enough >= num_target:
            self._ample_since = None
            return Decision(num_target, "steady")
        if self._ample_since is None:
            self._ample_since, self._most_enough = now, enough
        self._most_enough = max(self._most_enough, enough)
        num_replicas = self._most_enough if num_target == 1 else max(self._most_enough, 1)
        if now - self._ample_since < self._delay_s(signals, to_zero=num_replicas == 0):
            return Decision(num_target, "steady")
        self._reset()
        return Decision(num_replicas, "idle")

    def _enough(self, signals: Sequence[Signals]) -> int:
        """The fewest replicas that would do; none only for a model that nobody asks for anything."""
        options, num_ready = self._options, len(signals)
        work = sum(one.work for one in signals)
        if not num_ready or not (work or any(one.jobs for one in signals)):
            return 0
        wait = fmean(one.wait_s for one in signals) / (SLACK * options.target_wait_s)
        return _ceil(
            max(
                1.0,
                work / (SLACK * options.target_utilization),
                sum(one.memory for one in signals) / (SLACK * options.target_kv_cache_usage),
                work + max(0.0, num_ready - work) * wait,
            )
        )

    def _delay_s(self, signals: Sequence[Signals], *, to_zero: bool) -> float:
        options, load_s = self._options, _load_s(signals)
        stated = options.downscale_delay_s
        if to_zero and options.downscale_to_zero_delay_s is not None:
            stated = options.downscale_to_zero_delay_s
        return max(DOWNSCALE_DELAY_S, 2 * load_s) if stated is None else max(stated, load_s)

    def _reset(self) -> None:
        self._short_since = self._ample_since = self._complete_since = None


def _load_s(signals: Sequence[Signals]) -> float:
    return max((one.load_s for one in signals), default=0.0)


def _ceil(value: float) -> int:
    """Rounded up, but for what arithmetic adds to a whole number."""
    return math.ceil(value - 1e-9)
