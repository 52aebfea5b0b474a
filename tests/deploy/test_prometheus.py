"""Prometheus itself, by the shipped files: it scrapes a running Tandem, and queries of boards and alerts find data."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from serving import Serving, eventually, serving

from models.embedded.paths import EMBEDDED
from serve.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `deploy` is no part of the package

from deploy.grafana.boards import BOARDS  # noqa: E402
from deploy.grafana.panels import metrics_of  # noqa: E402

SHIPPED = ROOT / "deploy" / "prometheus"
RULES = [
    rule
    for path in sorted((SHIPPED / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
EMPTY_WHEN_HEALTHY = {
    "ALERTS": "no alert fires",
    "tandem:slo_burn:page": "no budget burns fast enough",
    "tandem:slo_burn:ticket": "no budget burns fast enough",
    "tandem_replicas_desired": "no model has an autoscaling_config here",
    "tandem_requests_held": "no model scales to zero here",
    "ray_serve_replica_processing_queries": "Ray exports it, where Tandem runs on a cluster",
    "ray_node_cpu_utilization": "Ray exports it, where Tandem runs on a cluster",
    "ray_node_gpus_utilization": "Ray exports it, where Tandem runs on a cluster",
}
"""Series → why a query of them may find nothing here."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus): rules are not checked"
)


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_no_fault_in_config_and_rules():
    promtool("check", "config", str(SHIPPED / "prometheus.yml"))


@needs_promtool
def test_every_alert_fires_for_what_is_bad_and_for_nothing_else():
    promtool("test", "rules", *map(str, sorted((SHIPPED / "tests").glob("*.yml"))))


def test_every_alert_is_tested_in_both_ways():
    """Each test names its alert's expected series, beside others that the same rules see and that must be quiet."""
    tests = [test for path in (SHIPPED / "tests").glob("*.yml") for test in yaml.safe_load(path.read_text())["tests"]]
    checks = [(check, test["input_series"]) for test in tests for check in test["alert_rule_test"]]
    fired = {
        (check["alertname"], alert["exp_labels"]["severity"]) for check, _ in checks for alert in check["exp_alerts"]
    }
    assert fired == {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}
    quiet = {check["alertname"] for check, series in checks if len(check["exp_alerts"]) < len(series)}
    assert quiet == {rule["alert"] for rule in ALERTS}


def test_every_alert_has_its_section_in_the_runbook():
    sections = re.findall(r"^## (\w+)$", (ROOT / "deploy/runbook.md").read_text(), re.M)
    assert sorted(sections) == sorted({rule["alert"] for rule in ALERTS})
    for rule in ALERTS:
        assert rule["annotations"]["runbook_url"] == f"deploy/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_links_within_the_runbook_lead_to_sections():
    text = (ROOT / "deploy/runbook.md").read_text()
    sections = {title.lower() for title in re.findall(r"^## (\w+)$", text, re.M)}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= sections


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_read_metrics_that_exist(rule):
    metrics_of(rule["expr"])


class Prometheus:
    """A running one."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[float]:
        """The values an instant query finds, those that are no numbers left out."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", (expression, answer)
        values = [float(series["value"][1]) for series in answer["data"]["result"]]
        return [value for value in values if not math.isnan(value)]

    def rules(self) -> list[dict]:
        groups = httpx.get(f"{self.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus): no query was tried on real data")
    if not (Path(EMBEDDED["tandem-text"]) / "model.safetensors").exists():
        pytest.skip("the embedded models are not here")
    with serving("--no-ray", "--api-key", "secret team-a", "--canary-period-s", "0.5") as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory) -> Iterator[Prometheus]:
    """By the shipped files, with this server as the target and all that takes seconds there in one second."""
    folder = tmp_path_factory.mktemp("prometheus") / "shipped"
    shutil.copytree(SHIPPED, folder)
    (folder / "targets.yml").write_text(yaml.safe_dump([{"targets": [server.url.removeprefix("http://")]}]))
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    files = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    process = subprocess.Popen(
        ["prometheus", *files, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        started = Prometheus(f"http://{address}")
        eventually(lambda: is_up(started), within_s=60)
        yield started
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_up(prometheus: Prometheus) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        if httpx.get(f"{prometheus.url}/-/ready", timeout=10).is_error:
            return False
        return prometheus.query('up{job="tandem"}') == [1.0]
    return False


def load(server: Serving) -> None:
    """A little of everything: chat, completions, an image with a preview, a cancel, refusals and an error."""
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer secret"}, timeout=60) as client:
        text, image = {"model": "tandem-text"}, {"model": "tandem-image", "prompt": "a red circle"}
        chat = text | {"messages": [{"role": "user", "content": "Tell me a story about a cat."}], "max_tokens": 20}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        many = text | {"prompt": "the cat " * 20, "max_tokens": 20, "ignore_eos": True}
        assert client.post("/v1/completions", json=many).status_code == 200
        shown = image | {"stream": True, "partial_images": 1, "num_inference_steps": 4}
        assert "completed" in client.post("/v1/images/generations", json=shown).text
        with client.stream("POST", "/v1/completions", json=many | {"max_tokens": 1000, "stream": True}) as left:
            next(left.iter_bytes())
        assert client.post("/v1/completions", json=text | {"prompt": "x", "max_tokens": -1}).status_code == 400
        late = image | {"num_inference_steps": 200, "timeout": 0.01}
        assert client.post("/v1/images/generations", json=late).status_code in (429, 504)  # as it is told early or late
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


@pytest.fixture(scope="module")
def scraped(server, prometheus) -> Prometheus:
    """After loads that two scrapes tell apart."""
    load(server)
    eventually(lambda: sum(prometheus.query("tandem_cancellations_total")) >= 1, within_s=30)
    load(server)
    eventually(lambda: sum(prometheus.query("tandem_cancellations_total")) >= 2, within_s=30)
    return prometheus


def filled_in(query: str) -> str:
    """As Grafana sends it with all models chosen."""
    for variable, value in (("$__rate_interval", "1m"), ("$__range", "5m"), ("$model", ".*")):
        query = query.replace(variable, value)
    return query


def may_be_empty(query: str) -> bool:
    return any(re.search(rf"\b{name}\b", query) for name in EMPTY_WHEN_HEALTHY)


def selectors(expression: str) -> list[str]:
    """The series a rule reads, without what is asked of their values: an alert's expression finds nothing in health."""
    found = re.findall(r"\b(?:tandem[_:][\w:]+|up)\b(?:\{[^}]*\})?(?:\[\w+\])?", expression)
    return [f"count_over_time({series})" if series.endswith("]") else series for series in found]


def test_every_query_of_every_panel_finds_data(scraped):
    queries = {filled_in(query) for board in BOARDS for row in board.rows.values() for p in row for query in p.queries}
    empty = {query for query in queries if not may_be_empty(query)}
    assert len(empty) > 70

    def all_found() -> bool:
        empty.difference_update([query for query in empty if scraped.query(query)])
        return not empty

    with contextlib.suppress(AssertionError):
        eventually(all_found, within_s=20, every_s=0.5)
    assert not empty
    for query in queries:  # those that may be empty are queries all the same
        scraped.query(query)


def test_every_rule_reads_series_that_are_there(scraped):
    read = {selector for rule in RULES for selector in selectors(rule["expr"]) if not may_be_empty(selector)}
    records = {rule["record"] for rule in RULES if "record" in rule and not may_be_empty(rule["record"])}
    for query in read | records:
        eventually(lambda query=query: scraped.query(query), within_s=20, every_s=0.2)
    assert {rule["health"] for rule in scraped.rules()} == {"ok"}


def test_a_short_mixed_load_fires_no_alert(scraped):
    assert scraped.query('ALERTS{alertstate="firing"}') == []


def test_what_is_scraped_is_all_that_metrics_promise(scraped):
    """Every metric of the table has a series under this load."""
    text = httpx.get(f"{scraped.url}/api/v1/label/__name__/values", timeout=10).json()["data"]
    silent = {name for name in METRICS if name not in text and f"{name}_count" not in text}
    assert silent <= EMPTY_WHEN_HEALTHY.keys()


def test_every_exception_is_needed():
    used = " ".join(query for board in BOARDS for row in board.rows.values() for p in row for query in p.queries)
    used += " ".join(rule["expr"] for rule in RULES)
    assert all(name in used for name in EMPTY_WHEN_HEALTHY)
