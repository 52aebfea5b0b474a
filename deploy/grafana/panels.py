"""Grafana's JSON for the boards of `boards.py`: rows of panels become a dashboard. The descriptions of panels are the
help of the metrics they show, from `serve/metrics.py`; a metric that is not there is an error.

Written for Grafana 10 and later (`schemaVersion` 39, the panels `timeseries`, `stat`, `bargauge`, `heatmap`, `table`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from serve.metrics import METRICS

SCHEMA_VERSION = 39
COLUMNS, HEIGHT = 24, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_NAME = re.compile(r"\btandem_\w+")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries`: PromQL → legend."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: Literal["timeseries", "stat", "bargauge", "heatmap", "table"] = "timeseries"
    width: int = 8
    note: str = ""
    stacked: bool = False
    most: float | None = None
    """Top of the scale."""
    lines: tuple[float, ...] = ()
    """Thresholds that are drawn, or that colour a number: above the last is red."""
    falling: bool = False
    """Below the thresholds is red, not above."""


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    rows: dict[str, tuple[Panel, ...]]
    """Title of a row → its panels."""


def metrics_of(query: str) -> list[str]:
    """The metrics of the table that a query reads. Raises KeyError for one that does not exist."""
    found = []
    for name in dict.fromkeys(_NAME.findall(query)):
        base = name if name in METRICS else _SUFFIX.sub("", name)
        found.append(METRICS[base].name)
    return found


def dashboard(board: Board) -> dict[str, Any]:
    """What Grafana provisions."""
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["tandem"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "links": [
            {"type": "dashboards", "title": "Tandem", "tags": ["tandem"], "asDropdown": True, "keepTime": True,
             "includeVars": True, "targetBlank": False, "icon": "external link", "tooltip": "", "url": ""}
        ],
        "annotations": {"list": [_alerts()]},
        "templating": {"list": [_source_variable(), _model_variable()]},
        "panels": list(_laid_out(board)),
    }  # fmt: skip


def _laid_out(board: Board) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for title, panels in board.rows.items():
        number += 1
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "panels": [],
               "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}}  # fmt: skip
        top, left = top + 1, 0
        for panel in panels:
            if left + panel.width > COLUMNS:
                top, left = top + HEIGHT, 0
            number += 1
            yield _panel(number, panel, {"x": left, "y": top, "w": panel.width, "h": HEIGHT})
            left += panel.width
        top += HEIGHT


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    names = dict.fromkeys(name for query in panel.queries for name in metrics_of(query))
    told = [f"{name}: {METRICS[name].help}" for name in names]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": "\n\n".join([panel.note, *told] if panel.note else told),
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(chr(ord("A") + i), panel, *query) for i, query in enumerate(panel.queries.items())],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _OPTIONS[panel.kind](panel),
    }


def _target(letter: str, panel: Panel, query: str, legend: str) -> dict[str, Any]:
    is_now = panel.kind in ("stat", "bargauge", "table")
    return {
        "refId": letter,
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query,
        "legendFormat": legend or "__auto",
        "instant": is_now,
        "range": not is_now,
        "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
    }


def _field(panel: Panel) -> dict[str, Any]:
    colours = ["red", "orange", "green"] if panel.falling else ["green", "orange", "red"]
    if len(panel.lines) == 1:
        del colours[1]
    steps: list[dict[str, Any]] = [{"color": colours[0], "value": None}]
    steps += [
        {"color": colours[min(i, len(colours) - 1)], "value": value} for i, value in enumerate(panel.lines, start=1)
    ]
    field: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind in ("timeseries", "bargauge"):
        field["min"] = 0
    if panel.most is not None:
        field["max"] = panel.most
    if panel.kind == "timeseries":
        field["custom"] = {
            "drawStyle": "line", "lineWidth": 1, "showPoints": "never", "spanNulls": False,
            "fillOpacity": 30 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.lines else "off"},
        }  # fmt: skip
    else:
        field["color"] = {"mode": "thresholds"}
    return field


def _reduced(panel: Panel) -> dict[str, Any]:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal" if panel.kind == "bargauge" else "auto",
    }


_OPTIONS = {
    "timeseries": lambda panel: {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": lambda panel: _reduced(panel) | {"colorMode": "value", "graphMode": "none", "textMode": "value_and_name"},
    "bargauge": lambda panel: _reduced(panel) | {"displayMode": "basic", "valueMode": "color", "showUnfilled": True},
    "heatmap": lambda panel: {
        "calculate": False,
        "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
        "cellGap": 1,
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
    },
    "table": lambda panel: {"showHeader": True, "cellHeight": "sm"},
}


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts", "enable": True, "iconColor": "red", "datasource": SOURCE,
        "expr": 'ALERTS{alertname=~"Tandem.*", alertstate="firing"}', "titleFormat": "{{alertname}}", "step": "60s",
    }  # fmt: skip


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0,
            "current": {}, "options": [], "refresh": 1, "regex": "", "multi": False, "includeAll": False}  # fmt: skip


def _model_variable() -> dict[str, Any]:
    query = "label_values(tandem_replicas, model)"
    return {"name": "model", "label": "Model", "type": "query", "datasource": SOURCE, "definition": query, "hide": 0,
            "query": {"query": query, "refId": "models"}, "refresh": 2, "regex": "", "sort": 1, "multi": True,
            "includeAll": True, "allValue": ".*", "options": [],
            "current": {"text": "All", "value": "$__all"}}  # fmt: skip
