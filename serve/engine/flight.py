"""A batch between its submission and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic

from serve.engine.interface import B, J


@dataclass(slots=True, eq=False)
class Flight(Generic[J, B]):
    """A batch on its way through the runner."""

    batch: B
    jobs: list[J]
    launched: float
    is_alone: bool
    """One job, and nothing else in flight: a failure is that job's."""
    handle: Any = None
    departed: list[str] = field(default_factory=list)
    """Jobs that ended when this was the last batch in flight: it may still use their tensors."""
