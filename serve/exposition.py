"""The Prometheus text of all processes' snapshots; prometheus-client formats it."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from serve.metrics import METRICS, Metric, Series, Snapshot


def render(snapshots: Iterable[Snapshot]) -> str:
    """The Prometheus text (version 0.0.4) of all processes' snapshots, each series labelled with its process."""
    registry = CollectorRegistry()
    registry.register(_Snapshots(tuple(snapshots)))
    return generate_latest(registry).decode()


class _Snapshots(Collector):
    """Snapshots as prometheus-client wants to read them."""

    def __init__(self, snapshots: tuple[Snapshot, ...]):
        self._snapshots = snapshots

    def collect(self) -> Iterable[Family]:
        families: dict[str, Family] = {}
        for snapshot in self._snapshots:
            for series in snapshot.series:
                metric = METRICS.get(series.name)
                if metric is None or not _fits(series, metric):
                    continue  # pushed by another version of Tandem
                if (family := families.get(metric.name)) is None:
                    family = Family(metric.name.removesuffix("_total"), metric.help, metric.kind)
                    families[metric.name] = family
                labels = {**dict(zip(metric.labels, series.labels)), "process": snapshot.process}
                _add(family, metric, labels, series.values)
        return families.values()


def _fits(series: Series, metric: Metric) -> bool:
    num_values = len(metric.buckets) + 2 if metric.buckets else 1
    return len(series.labels) == len(metric.labels) and len(series.values) == num_values


def _add(family: Family, metric: Metric, labels: dict[str, str], values: tuple[float, ...]) -> None:
    if metric.kind != "histogram":
        family.add_sample(metric.name, labels, values[0])
        return
    total = 0.0
    for bound, number in zip((*metric.buckets, float("inf")), values):
        total += number
        family.add_sample(f"{metric.name}_bucket", {**labels, "le": floatToGoString(bound)}, total)
    family.add_sample(f"{metric.name}_count", labels, total)
    family.add_sample(f"{metric.name}_sum", labels, values[-1])
