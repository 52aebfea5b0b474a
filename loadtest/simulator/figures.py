"""What a run comes to: the words are those of `loadtest.http`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loadtest.simulator.visit import Visit


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What a request has to keep to be good."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1

    def holds(self, visit: Visit) -> bool:
        done = not visit.is_refused and visit.first_s is not None and visit.ended_s is not None
        return done and visit.ttft_s <= self.ttft_s and visit.tpot_s <= self.tpot_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of the requests that arrived within a window."""

    requests: int
    completed: int
    refused: int
    requests_per_s: float
    """That ended, a second."""
    tokens_per_s: float
    """Output tokens of those."""
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    e2e_p50_s: float
    hit_rate: float
    """Share of prompt tokens that were found cached."""
    attainment: float
    """Share of the requests that kept the SLO; refused and unfinished ones did not."""
    goodput_per_s: float
    """Requests that kept it, a second."""

    def row(self) -> dict[str, float]:
        return asdict(self)


def figures(visits: Sequence[Visit], *, begin_s: float, end_s: float, slo: Slo) -> Figures:
    """Rates are over the whole window: who arrived in it, and what ended in it whenever it had come."""
    seconds = end_s - begin_s
    here = [visit for visit in visits if begin_s <= visit.arrived_s < end_s]
    done = [visit for visit in here if visit.ended_s is not None and not visit.is_refused]
    ended = [
        visit
        for visit in visits
        if visit.ended_s is not None and begin_s <= visit.ended_s < end_s and not visit.is_refused
    ]
    num_good = sum(slo.holds(visit) for visit in here)
    ttft = sorted(visit.ttft_s for visit in done)
    tpot = sorted(visit.tpot_s for visit in done if visit.num_output > 1)
    num_prompt = sum(visit.num_prompt for visit in done)
    return Figures(
        requests=len(here),
        completed=len(done),
        refused=sum(visit.is_refused for visit in here),
        requests_per_s=len(ended) / seconds,
        tokens_per_s=sum(visit.num_output for visit in ended) / seconds,
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p99_s=quantile(ttft, 0.99),
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p99_s=quantile(tpot, 0.99),
        e2e_p50_s=quantile(sorted((visit.ended_s or 0.0) - visit.arrived_s for visit in done), 0.5),
        hit_rate=sum(visit.num_cached for visit in done) / num_prompt if num_prompt else 0.0,
        attainment=num_good / len(here) if here else 1.0,
        goodput_per_s=num_good / seconds,
    )


def quantile(ranked: Sequence[float], share: float) -> float:
    """By the nearest rank; 0 of nothing."""
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else 0.0
