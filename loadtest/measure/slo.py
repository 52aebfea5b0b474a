"""Service level objectives: which requests were good. Goodput is their rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loadtest.measure.outcome import Outcome, Status
from loadtest.traffic.ask import ImageAsk

TEXT_TERMS = ("ttft", "tpot", "e2el")
IMAGE_TERMS = ("ttfp", "image_e2el")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds by name. Every request must meet all that are about its kind."""

    limits_ms: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, terms: Iterable[str]) -> Slo:
        """From `ttft:500 tpot:50 image_e2el:3000`. Raises ValueError."""
        limits = {}
        for term in terms:
            name, _, value = term.partition(":")
            if name not in (*TEXT_TERMS, *IMAGE_TERMS):
                raise ValueError(f"--goodput {term!r}: choose from {', '.join((*TEXT_TERMS, *IMAGE_TERMS))}")
            try:
                limits[name] = float(value)
            except ValueError:
                raise ValueError(f"--goodput {term!r}: write NAME:MILLISECONDS, as in ttft:500") from None
        return cls(tuple(limits.items()))

    def is_good(self, outcome: Outcome) -> bool:
        """Answered, without a flaw, within every limit. A limit on something that the answer does not have (the TPOT
        of one token) is met."""
        if not outcome.is_ok or outcome.flaw:
            return False
        times: dict[str, float | None]
        if isinstance(outcome.ask, ImageAsk):
            times = {"ttfp": outcome.ttfp, "image_e2el": outcome.e2e}
            if outcome.ask.deadline_s is not None and outcome.e2e > outcome.ask.deadline_s:
                return False
        else:
            times = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.e2e}
        return all((time := times.get(name)) is None or time * 1e3 <= limit for name, limit in self.limits_ms)


def judged(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that count: not probes, and not what was left on purpose."""
    return [one for one in outcomes if one.group != "probe" and one.status is not Status.CANCELLED]


def good_share(outcomes: Iterable[Outcome], slo: Slo) -> float:
    """Of all that count. Errors, 429s and timeouts are not good; nothing is good of nothing."""
    counted = judged(outcomes)
    return sum(slo.is_good(outcome) for outcome in counted) / len(counted) if counted else 0.0
