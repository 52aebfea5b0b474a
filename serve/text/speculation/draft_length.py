"""How many draft tokens the next step verifies behind each decode: as many as measurements say pay, often none.

A step over R rows with k drafts each yields R * (1 + a1 + a1*a2 + ...) tokens, where a_j is the share of drafts at
position j that hold when those before it do, and takes t(R, k) seconds, drafting included. Both are measured: a_j over
all steps, t by the number of rows (in classes a fifth wide) and k. The k with the most tokens a second is taken; none
unless that is worth `MARGIN`. Costs are far from flat and differ by machine (on CPU a few rows cost what one does, many
cost their number), so nothing about them is assumed: a k not tried at this R is estimated between those that were.

What is never tried is never known, so now and then a probe tries another k for a few steps. Probes are rationed: what
they lost against the best known k stays below `PROBE_SHARE` of all time, beyond `FIRST_PROBES`. That bounds what
speculation can cost where it does not pay, whatever the reason. A draft model's catching up (new prompts, steps without
drafts) is no property of a step; it is spread over the steps that draft.

The tokens-per-second model is that of Leviathan et al. (2023), section 3.3, with measured terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2
from typing import Protocol

from serve.text.sequence import TokenBatch, TokenOutput

MARGIN = 1.1
"""Tokens a second over those without drafts. With 1.04 drafts were taken on noise: at 4 streams of a busy machine
they lost 4 % of CPU time (median of 14 pairs of turns, `python -m loadtest.speculation`)."""
PROBE_SHARE = 0.01
FIRST_PROBES = 32
"""What probes may lose before there is any time to be a share of, in steps without drafts. In steps, not in seconds:
with 0.2 s a 0.6 B model on a CPU (63 ms a step) had not tried a draft after 300 steps."""
PROBE_STEPS = 3
"""The first of them often catches up and tells nothing of the cost."""
PROBE_AFTER, PROBE_RARELY = 64, 1024
"""Steps after which what is known of a k is tried again: the first, doubled up to the second while nothing changes."""
PRIOR_ACCEPTANCE, PRIOR_WEIGHT = 0.8, 8
ACCEPTANCE_WINDOW = 100
"""Drafts over which acceptance is averaged: at most 5 % standard deviation."""
COST_WINDOW = 32
"""Steps over which a cost is averaged."""
SPREAD_OVER = 64
"""Drafting rows that a first catching-up is spread over, before it is known how long sequences are."""
FORGET = 0.998
"""Of what was spent on catching up, by drafting row."""


class DraftLength(Protocol):
    """Chooses from what it has observed. No clock: durations come with the outputs."""

    def choose(self, num_rows: int) -> int:
        """Drafts a row, at most, for a step of `num_rows` sequences. Changes nothing: it may be asked in vain."""
        ...

    def observe(self, batch: TokenBatch, output: TokenOutput) -> None:
        """A step was computed."""
        ...


@dataclass(slots=True)
class Mean:
    """Of the latest `window` values, the older the less."""

    window: int
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.window)


@dataclass(slots=True)
class Acceptance:
    """Drafts verified and accepted, by position: since the start for metrics, lately for decisions."""

    most: int
    num_rows: int = 0
    """Rows that had drafts."""
    num_drafted: int = 0
    by_position: list[int] = field(default_factory=list)
    """Accepted ones."""
    lately: list[Mean] = field(default_factory=list)
    """The share of drafts at each position that held when those before it did."""

    def __post_init__(self) -> None:
        self.by_position = [0] * self.most
        self.lately = [Mean(ACCEPTANCE_WINDOW, PRIOR_ACCEPTANCE, PRIOR_WEIGHT) for _ in range(self.most)]

    @property
    def num_accepted(self) -> int:
        return sum(self.by_position)

    @property
    def mean_length(self) -> float:
        """Tokens that a row with drafts gave."""
        return 1 + self.num_accepted / self.num_rows if self.num_rows else 1.0

    def add(self, num_asked: int, num_drafted: int, num_accepted: int) -> None:
        """One row. A draft that was asked for and not found counts for decisions as one that did not hold."""
        if num_drafted:
            self.num_rows += 1
            self.num_drafted += num_drafted
        for position in range(min(num_accepted + 1, num_asked)):
            self.lately[position].add(float(position < num_accepted))
        for position in range(num_accepted):
            self.by_position[position] += 1

    def num_tokens(self, num_drafts: int) -> float:
        """Tokens to expect of a row."""
        total = share = 1.0
        for mean in self.lately[:num_drafts]:
            share *= mean.value
            total += share
        return total


@dataclass(slots=True)
class _Costs:
    """Steps of about the same number of rows."""

    seconds: dict[int, Mean] = field(default_factory=dict)
    """By number of drafts."""
    num_steps: int = 0
    tried: dict[int, int] = field(default_factory=dict)
    """When a number of drafts was last tried, in steps."""
    patience: dict[int, int] = field(default_factory=dict)

    def add(self, num_drafts: int, seconds: float) -> None:
        mean = self.seconds.setdefault(num_drafts, Mean(COST_WINDOW))
        mean.add(min(seconds, 2 * mean.value) if mean.count > 2 else seconds)  # a pause of the machine is no cost
        self.tried[num_drafts] = self.num_steps

    def estimate(self, num_drafts: int) -> float | None:
        """Seconds of a step, between or beyond those measured; None when there are less than two to go by."""
        known = self.seconds
        if num_drafts in known:
            return known[num_drafts].value
        if len(known) < 2:
            return None
        below = max((k for k in known if k < num_drafts), default=None)
        above = min((k for k in known if k > num_drafts), default=None)
        low, high = (below, above) if below is not None and above is not None else sorted(known)[-2:]
        slope = (known[high].value - known[low].value) / (high - low)
        return known[low].value + max(slope, 0.0) * (num_drafts - low)


@dataclass(slots=True)
class _Probe:
    size: int
    """Class of the number of rows."""
    num_drafts: int
    num_steps_left: int
    num_tokens: float
    """Expected of a row when it began."""


class AdaptiveLength:
    """A `DraftLength` up to `most`, and the counters behind the metrics."""

    def __init__(self, most: int):
        self.most = most
        self.acceptance = Acceptance(most)
        self.current = 0
        """Drafts a row of the last step."""
        self._costs: dict[int, _Costs] = {}
        self._elapsed_s = self._lost_s = 0.0
        self._overhead_s, self._num_drafting = 0.0, float(SPREAD_OVER)
        """Spent on catching up, and the drafting rows it was for; both fade."""
        self._probe: _Probe | None = None

    def choose(self, num_rows: int) -> int:
        size = _size_class(num_rows)
        if self._probe is not None and self._probe.size == size:
            return self._probe.num_drafts
        return self._best(size, num_rows)

    def observe(self, batch: TokenBatch, output: TokenOutput) -> None:
        num_rows, num_asked = len(batch.rows), max(row.num_drafts for row in batch.rows)
        num_tokens = num_drafting = 0
        for row, sampled in zip(batch.rows, output.token_ids):
            num_tokens += len(sampled)
            if row.num_drafts and (row.drafts or output.is_typical):
                num_drafting += 1
                self.acceptance.add(row.num_drafts, len(row.drafts), len(sampled) - 1)
        self.current = num_asked
        self._elapsed_s += output.seconds
        if any(len(row.token_ids) != 1 for row in batch.rows):
            return  # a prefill's cost tells nothing about a decode's
        size = _size_class(num_rows)
        costs = self._costs.setdefault(size, _Costs())
        costs.num_steps += 1
        is_probe = self._probe is not None and (self._probe.size, self._probe.num_drafts) == (size, num_asked)
        if is_probe:
            self._charge(costs, size, num_rows, num_tokens, output.seconds)
        elif num_asked:
            self._spread(costs, num_asked, num_drafting, output)
        is_whole = sum(row.num_drafts for row in batch.rows) >= 0.8 * num_asked * num_rows
        if output.is_typical and is_whole:
            costs.add(num_asked, output.seconds)
        if not self._goes_on(costs, is_probe):
            self._plan_probe(costs, size, num_rows)

    # -- what pays -------------------------------------------------------------------------------------------------

    def _best(self, size: int, num_rows: int) -> int:
        costs = self._costs.get(size)
        if costs is None or (plain := self._seconds_per_token(costs, 0, num_rows)) is None:
            return 0
        best, least = 0, plain / MARGIN
        for num_drafts in range(1, self.most + 1):
            seconds = self._seconds_per_token(costs, num_drafts, num_rows)
            if seconds is not None and seconds < least:
                best, least = num_drafts, seconds
        return best

    def _seconds_per_token(self, costs: _Costs, num_drafts: int, num_rows: int) -> float | None:
        """Of one row."""
        seconds = costs.estimate(num_drafts)
        if seconds is None:
            return None
        if num_drafts:
            seconds += num_rows * self._overhead_s / self._num_drafting
        return seconds / self.acceptance.num_tokens(num_drafts)

    def _spread(self, costs: _Costs, num_drafts: int, num_drafting: int, output: TokenOutput) -> None:
        """Account for a step that drafted: what it took beyond a typical one was catching up."""
        fade = FORGET**num_drafting
        self._overhead_s, self._num_drafting = self._overhead_s * fade, self._num_drafting * fade + num_drafting
        usual = costs.estimate(num_drafts)
        if not output.is_typical and usual is not None:
            self._overhead_s += max(output.seconds - usual, 0.0)

    # -- probes ----------------------------------------------------------------------------------------------------

    def _charge(self, costs: _Costs, size: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A probe's loss: what it took beyond what its tokens would have taken with the best k known."""
        per_token = self._seconds_per_token(costs, self._best(size, num_rows), num_rows)
        worth_s = 0.0 if per_token is None else num_tokens / num_rows * per_token
        self._lost_s += max(seconds - worth_s, 0.0)

    def _goes_on(self, costs: _Costs, is_probe: bool) -> bool:
        """Whether the probe, if any, needs more steps. It ends early when the number of rows changes."""
        probe = self._probe
        if probe is None:
            return False
        probe.num_steps_left -= 1
        if is_probe and probe.num_steps_left:
            return True
        if self.acceptance.num_tokens(probe.num_drafts) > 1.05 * probe.num_tokens:
            costs.patience[probe.num_drafts] = PROBE_AFTER // 4  # the text has become easier: look again soon
        self._probe = None
        return False

    def _plan_probe(self, costs: _Costs, size: int, num_rows: int) -> None:
        """Begin a probe that is due and can be afforded."""
        plain = costs.seconds.get(0)
        if plain is None or plain.count < 2:
            return
        best = self._best(size, num_rows)
        for num_drafts in sorted(range(self.most + 1), key=lambda k: costs.tried.get(k, -1)):
            if num_drafts == best or not self._is_due(costs, num_drafts):
                continue
            # Unknown, a draft may cost what a token without drafts does.
            seconds = costs.estimate(num_drafts) or (num_drafts + 1) * plain.value
            if self._lost_s + PROBE_STEPS * seconds > FIRST_PROBES * plain.value + PROBE_SHARE * self._elapsed_s:
                continue
            costs.patience[num_drafts] = min(2 * costs.patience.get(num_drafts, PROBE_AFTER // 2), PROBE_RARELY)
            costs.tried[num_drafts] = costs.num_steps
            self._probe = _Probe(size, num_drafts, PROBE_STEPS, self.acceptance.num_tokens(num_drafts))
            return

    def _is_due(self, costs: _Costs, num_drafts: int) -> bool:
        if num_drafts not in costs.tried:
            return num_drafts in (min(2, self.most), self.most)  # the others are estimated until one is the best
        return costs.num_steps - costs.tried[num_drafts] >= costs.patience.get(num_drafts, PROBE_AFTER)


def _size_class(num_rows: int) -> int:
    return round(4 * log2(num_rows)) if num_rows else 0
