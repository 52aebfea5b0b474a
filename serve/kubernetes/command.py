"""`tandem k8s check` and `tandem k8s rules`. What they need beyond serving is the extra `k8s`, loaded when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from serve.errors import ConfigError

EXTRA = ("kubernetes_validate", "jsonschema", "cel")


def add_actions(actions: Any) -> None:
    """Add the actions to `tandem k8s`' parser."""
    check = actions.add_parser("check", help="build manifests and report all that is wrong with them; asks no cluster")
    check.set_defaults(run=_check)
    check.add_argument(
        "path", nargs="?", type=Path, default=Path("k8s"), metavar="DIR",
        help="a kustomization, a folder with overlays/, or a file that kustomize wrote (default: k8s)",
    )  # fmt: skip
    check.add_argument(
        "--schemas", type=Path, metavar="DIR", help="CustomResourceDefinition files to use instead of the own"
    )
    check.add_argument("--kubernetes-version", metavar="V", help="whose schemas to use (default: 1.33)")
    check.add_argument(
        "--external",
        nargs="+",
        default=(),
        metavar="KIND/NAME",
        help="objects that exist in the cluster by other means",
    )
    check.add_argument("--final", action="store_true", help="fail also for examples that are still to be replaced")
    rules = actions.add_parser("rules", help="write Prometheus rule files as a PrometheusRule, for its operator")
    rules.set_defaults(run=_rules)
    rules.add_argument("files", nargs="+", type=Path, metavar="FILE")


def _check(arguments: argparse.Namespace) -> None:
    """Exit status 0: nothing is wrong; 1: something is."""
    try:
        from serve.kubernetes.check import RULES, TO_SET, VERSION, check_path
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ConfigError(f"tandem k8s check needs {error.name}; pip install 'tandem-serve[k8s]'") from None
    if arguments.schemas is not None and not arguments.schemas.is_dir():
        raise ConfigError(f"--schemas {str(arguments.schemas)!r} is no folder")
    reports = check_path(
        arguments.path,
        schemas=arguments.schemas,
        version=arguments.kubernetes_version or VERSION,
        external=arguments.external,
    )
    for report in reports:
        print(f"{report.name}: {report.num_objects} objects, {'FAILED' if report.errors else 'valid'}")
        for finding in report.errors:
            print(f"  error   {finding}")
        for finding in report.to_set:
            print(f"  to set  {finding}")
    errors, to_set = sum(len(r.errors) for r in reports), sum(len(r.to_set) for r in reports)
    print(f"{len(RULES) + len(TO_SET)} rules beside the schemas: {errors} errors, {to_set} to set")
    if errors or (arguments.final and to_set):
        raise SystemExit(1)


def _rules(arguments: argparse.Namespace) -> None:
    """A PrometheusRule on standard output, its groups those of the files."""
    import yaml

    groups = []
    for path in arguments.files:
        try:
            groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(f"{str(path)!r} holds no Prometheus rules: {type(error).__name__}") from None
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tandem", "labels": {"app.kubernetes.io/name": "tandem"}},
        "spec": {"groups": groups},
    }
    print(yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=120), end="")
