"""What HTTP says of an error."""

from __future__ import annotations

from serve.errors import Overloaded
from serve.gateway.errors import answer


def test_those_who_are_told_the_same_time_do_not_come_back_together():
    """Uniform over a quarter of it: of 400, three in four of forty equal parts have somebody with all but 1e-9."""
    told = [float(dict(answer(Overloaded("full", retry_after_s=40.0)).headers)["retry-after-ms"]) for _ in range(400)]
    assert min(told) >= 40_000 and max(told) <= 50_001
    assert len({int((each - 40_000) / 250) for each in told}) >= 30


def test_nobody_is_told_to_come_back_at_once():
    assert float(dict(answer(Overloaded("full", retry_after_s=0.0)).headers)["retry-after-ms"]) >= 1000
