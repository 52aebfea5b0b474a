"""The engine's contract, over random plans, for both shapes of fake and for the token scheduler, at every depth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from contract import DEPTHS, PROPERTIES, Plan, Scenario, Trace, plans, simulate
from hypothesis import given, settings
from scenarios import FakeLatents, FakeTokens, Tokens, TokensInStages, TokensUnshared

SCENARIOS: list[Callable[[], Scenario]] = [FakeTokens, FakeLatents, Tokens, TokensUnshared, TokensInStages]


@pytest.fixture(scope="module", autouse=True)
def silence() -> Iterator[None]:
    """Thousands of failures are made on purpose; their tracebacks would be most of the tests' time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("holds", PROPERTIES)
@settings(max_examples=15, deadline=None)
@given(plan=plans())
def test_holds_over_random_plans(
    holds: Callable[[Trace], None], scenario: Callable[[], Scenario], depth: int, plan: Plan
) -> None:
    holds(simulate(scenario(), plan, depth))
