"""The Grafana boards: written by their generator, of metrics that exist, with every metric on some panel."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from serve.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `deploy` is no part of the package

from deploy.grafana.boards import BOARDS, FOLDER, files  # noqa: E402
from deploy.grafana.panels import COLUMNS, metrics_of  # noqa: E402

ON_NO_PANEL: dict[str, str] = {}
"""Metric → why no board shows it."""


def boards() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def test_files_are_what_the_generator_writes():
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == files(), (
        "run python -m deploy.grafana.boards"
    )


def test_every_metric_is_on_a_panel_or_has_a_reason_not_to_be():
    shown = {
        name
        for board in BOARDS
        for row in board.rows.values()
        for panel in row
        for query in panel.queries
        for name in metrics_of(query)
    }
    assert set(METRICS) - shown == set(ON_NO_PANEL)


def test_a_query_of_a_metric_that_does_not_exist_is_no_panel():
    with pytest.raises(KeyError):
        metrics_of("rate(tandem_nonsense_total[5m])")


@pytest.mark.parametrize("board", boards(), ids=lambda board: board["uid"])
def test_boards_have_the_structure_that_grafana_reads(board):
    """Grafana itself is not here: these are the fields of its dashboard model that a provisioned file needs."""
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time", "annotations"} <= board.keys()
    assert len(board["uid"]) <= 40
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"])
               for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not own & cells, f"{panel['title']} lies on another panel"
        cells |= own
        if panel["type"] != "row":
            assert (
                panel["description"] or "ray" in panel["targets"][0]["expr"] or "ALERTS" in panel["targets"][0]["expr"]
            )
            assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH")[: len(panel["targets"])]
            steps = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
            assert steps[0] is None and all(low < high for low, high in pairwise(steps[1:]))


def test_provisioning_names_what_is_there():
    folder = FOLDER.parent / "provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((folder / "dashboards/tandem.yml").read_text())["providers"]
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"] == scrape
    assert provider["type"] == "file" and len(boards()) == len(BOARDS) == 5
