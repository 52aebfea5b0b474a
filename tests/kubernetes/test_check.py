"""The manifests are right, and each thing that can be wrong with them is found, by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("kubernetes_validate", reason="the extra k8s is not installed")
from broken_manifests import CASES, K8S, OVERLAYS, good

from serve.kubernetes import crd
from serve.kubernetes.check import RULES, TO_SET, check_objects, check_path, rule_name

ROOT = K8S.parent


def findings(objects):
    return list(check_objects("test", objects, crd.load()))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_valid(overlay):
    assert [str(finding) for finding in findings(good(overlay)) if finding.level == "error"] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_what_is_broken_is_found(case):
    found = [finding for finding in findings(case.objects()) if finding.rule == case.rule]
    assert any(case.says in str(finding) for finding in found), found or "nothing was found"


def test_every_rule_has_a_broken_case():
    covered = {case.rule for case in CASES}
    assert {rule_name(rule) for rule in RULES} <= covered
    assert {"kubernetes-schema", "custom-resource"} <= covered


def test_examples_are_listed_and_fail_only_when_the_check_is_final(capsys):
    from serve.cli import main

    path = str(K8S / "overlays" / "production")
    main(["k8s", "check", path])
    assert "to set  Gateway/tandem: tandem.example.com" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["k8s", "check", path, "--final"])
    assert ended.value.code == 1
    assert rule_name(TO_SET[0]) in capsys.readouterr().out


def test_schemas_may_come_from_the_projects_own_files(tmp_path):
    """As they are published: several versions, descriptions, and so on."""
    schema = crd.load()["ServiceMonitor"].schema
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    definition = {
        "kind": "CustomResourceDefinition",
        "spec": {"group": "monitoring.coreos.com", "scope": "Namespaced", "names": {"kind": "ServiceMonitor"}},
    }
    definition["spec"]["versions"] = [version]
    (tmp_path / "crd.yaml").write_text(json.dumps(definition))
    [report] = check_path(K8S / "overlays" / "no-ray", schemas=tmp_path)
    said = [str(error) for error in report.errors]
    assert len(said) == 1 and "keda.sh/v1alpha1 ScaledObject is neither" in said[0]


def test_a_file_that_cannot_be_built_is_told_and_not_guessed(tmp_path):
    overlay = tmp_path / "k8s" / "overlays" / "mine"
    shutil.copytree(K8S, tmp_path / "k8s")
    shutil.copytree(tmp_path / "k8s" / "overlays" / "cpu-dev", overlay)
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write("helmCharts: []\n")
    [report] = check_path(overlay)
    assert "helmCharts" in str(report.errors[0]) and "kustomize build" in str(report.errors[0])


def test_the_rules_of_prometheus_become_an_object_that_its_operator_takes(capsys, tmp_path):
    from serve.cli import main

    files = sorted(map(str, (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml")))
    assert files
    main(["k8s", "rules", *files])
    (tmp_path / "rules.yaml").write_text(capsys.readouterr().out)
    [report] = check_path(Path(tmp_path / "rules.yaml"))
    assert report.errors == [] and report.num_objects == 1


def test_ray_answers_where_probes_ask_without_its_token():
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    from serve.kubernetes.rules.pods import RAY_ROUTES

    assert set(RAY_ROUTES["dashboard-agent-listen-port"]) <= set(PUBLIC_EXACT_PATHS)


def test_the_manifests_name_the_ray_that_the_images_hold():
    locked = [(ROOT / "deploy" / "locks" / f"{target}.txt").read_text() for target in ("cpu", "cuda")]
    [service] = [manifest for manifest in good("production") if manifest["kind"] == "RayService"]
    version = service["spec"]["rayClusterConfig"]["rayVersion"]
    assert all(re.search(rf"^ray(\[\w+\])?=={re.escape(version)}\b", text, flags=re.M) for text in locked)
