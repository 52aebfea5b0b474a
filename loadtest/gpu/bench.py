"""What one part of the GPU measurements is given: a device, a budget of seconds, and a place for its rows.

A part is a function of a `Bench`. Each row is kept in `DIR/PART.json` as soon as it is measured, so that of a part that
is cut, or fails, what it had stays. What would not fit the budget any more is not begun, and is named in `skipped`.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu.machine import About

STATES = ("running", "done", "cut", "failed", "wrong")
"""wrong: it ran, and what was computed is not what it must be."""


class WrongResult(Exception):
    """What was computed is not what it must be."""


@dataclass(slots=True)
class Outcome:
    """What came of a part: the content of its file."""

    part: str
    about: dict[str, Any]
    budget_s: float
    state: str = "running"
    seconds: float = 0.0
    error: str | None = None
    skipped: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_rehearsal(self) -> bool:
        return bool(self.about["is_rehearsal"])

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]

    def write(self, folder: Path) -> None:
        """Whole or not at all: the part may be killed at any time."""
        path = path_of(folder, self.part)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        values = {name: getattr(self, name) for name in self.__slots__}
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)


def path_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def read_outcome(folder: Path, part: str) -> Outcome | None:
    """None where the part has not been begun."""
    path = path_of(folder, part)
    return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


class Bench:
    """Passed to a part. `is_rehearsal`: on the CPU with tiny shapes, to run the code; its figures mean nothing."""

    def __init__(
        self,
        part: str,
        folder: Path,
        about: About,
        *,
        budget_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder = folder
        self.is_rehearsal = about.is_rehearsal
        self.device = torch.device("cpu" if self.is_rehearsal else "cuda")
        self.outcome = Outcome(part, about.as_dict(), budget_s)
        self.failures: list[str] = []
        self._clock = clock
        self._began = clock()

    @property
    def left_s(self) -> float:
        return self.outcome.budget_s - (self._clock() - self._began)

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, `what` is noted as skipped."""
        if self.left_s >= seconds:
            return True
        self.outcome.skipped.append(what)
        print(f"# skipped, {self.left_s:.0f} s are left: {what}", flush=True)
        return False

    def row(self, kind: str, **values: Any) -> None:
        """Keep a row; fractions with four significant digits or more."""
        values = {name: _rounded(value) for name, value in values.items()}
        self.outcome.rows.append({"kind": kind, **values})
        print(f"# {kind}: " + ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)
        self.keep()

    def note(self, sentence: str) -> None:
        """Why something is not measured here."""
        self.outcome.skipped.append(sentence)
        print(f"# {sentence}", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails in it does not stop the rest of the part, which is told as failed at its end."""
        try:
            yield
        except WrongResult:
            raise
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{what}: {type(error).__name__}: {error}"[:300])

    def keep(self, state: str = "running", error: str | None = None) -> None:
        self.outcome.state, self.outcome.error = state, error
        self.outcome.seconds = round(self._clock() - self._began, 1)
        self.outcome.write(self.folder)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
