"""Where the benchmarks' results go: `RESULT {json}` lines on the screen, and the same objects in a file."""

from __future__ import annotations

import json
from typing import Any


class Report:
    """Prints rows, fractions rounded to four digits, and appends them to a file where one is given."""

    def __init__(self, path: str | None):
        self._path = path

    def __call__(self, **row: Any) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        line = json.dumps(rounded)
        print("RESULT " + line, flush=True)
        if self._path:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, by the nearest rank."""
    ranked = sorted(seconds)
    if not ranked:
        return {}
    return {f"p{p}": round(1e3 * ranked[min(len(ranked) - 1, len(ranked) * p // 100)], 2) for p in (50, 90, 99)}
