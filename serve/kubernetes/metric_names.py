"""Metric names in PromQL, against those that Tandem has."""

from __future__ import annotations

import re

from serve.metrics import METRICS

_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def unknown_metrics(query: str) -> list[str]:
    """The `tandem_*` names of a query that no process exports."""
    known = {name + suffix for name, m in METRICS.items() for suffix in _SUFFIXES.get(m.kind, ("",))}
    return sorted(set(re.findall(r"\btandem_[a-z0-9_]+\b", query)) - known)
