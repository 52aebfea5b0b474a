"""`tandem k8s check`: build manifests and say all that is wrong with them, without a cluster.

Four layers: the build (`kustomize.py`), the schemas of Kubernetes' own kinds (kubernetes-validate), those of custom
resources with their defaults and CEL rules (`crd.py`), and the rules of `rules/`, which look at all objects together
and at Tandem's own config file. What only a cluster can say stays unsaid: see k8s/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import kubernetes_validate

from serve.errors import ConfigError
from serve.kubernetes import crd
from serve.kubernetes.kustomize import FILE, KustomizeError, Manifest, build, identity, load_documents
from serve.kubernetes.overlay import Finding, Overlay
from serve.kubernetes.rules import application, availability, names, network, pods, ray

VERSION = "1.33"
"""Of Kubernetes, whose schemas the manifests are held against."""
RULES = (*names.RULES, *pods.RULES, *application.RULES, *ray.RULES, *availability.RULES, *network.RULES)
TO_SET = application.TO_SET
EXTERNAL = ("Secret/tandem-api-keys", "Secret/tandem-hf-token", "Secret/tandem-redis", "Secret/tandem-tls")
"""What k8s/README.md tells the user to make: secrets are in no repository."""

Rule = Callable[[Overlay], Iterable[tuple[str, str]]]


@dataclass(frozen=True)
class Report:
    """Of one overlay."""

    name: str
    num_objects: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def to_set(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "to set"]


def check_path(
    path: Path, *, schemas: Path | None = None, version: str = VERSION, external: Sequence[str] = ()
) -> list[Report]:
    """Reports of what is at `path`: one kustomization, a folder with `overlays/`, or a file that another builder wrote.

    Raises ConfigError when there is none of them.
    """
    if path.is_file():
        return [_report(path.name, partial(load_documents, path), schemas, version, external)]
    folders = (
        [path] if (path / FILE).is_file() else sorted(file.parent for file in (path / "overlays").glob(f"*/{FILE}"))
    )
    if not folders:
        raise ConfigError(
            f"{str(path)!r} has neither a {FILE} nor overlays/*/{FILE}; name a folder that has, or a file"
        )
    return [_report(folder.name, partial(build, folder), schemas, version, external) for folder in folders]


def check_objects(
    name: str, objects: list[Manifest], known: dict[str, crd.Crd], version: str = VERSION, external: Iterable[str] = ()
) -> Iterator[Finding]:
    """Schemas first: rules look at an overlay only when its objects have the shape they rely on."""
    broken = [finding for manifest in objects for finding in _check_schema(manifest, known, version)]
    yield from broken
    if broken:
        return
    overlay = Overlay(name, objects, (*EXTERNAL, *external))
    for level, rules in (("error", RULES), ("to set", TO_SET)):
        for rule in rules:
            for where, message in rule(overlay):
                yield Finding(rule_name(rule), where, message, "error" if level == "error" else "to set")


def rule_name(rule: Rule) -> str:
    return getattr(rule, "__name__", str(rule)).replace("_", "-")


def _report(
    name: str, make: Callable[[], list[Manifest]], schemas: Path | None, version: str, external: Sequence[str]
) -> Report:
    try:
        objects = make()
    except KustomizeError as error:
        return Report(name, 0, (Finding("build", name, str(error)),))
    return Report(name, len(objects), tuple(check_objects(name, objects, crd.load(schemas), version, external)))


def _check_schema(manifest: Manifest, known: dict[str, crd.Crd], version: str) -> Iterator[Finding]:
    where = identity(manifest)
    if manifest["kind"] in known:
        for said in crd.check(known[manifest["kind"]], manifest):
            yield Finding("custom-resource", where, said)
        return
    said = _core_problem(json.dumps(manifest, sort_keys=True), version)
    if said:
        yield Finding("kubernetes-schema", where, said)


@cache
def _core_problem(text: str, version: str) -> str:
    """Of an object of Kubernetes' own kinds, as JSON; empty when it has the right shape."""
    manifest = json.loads(text)
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return (
            f"{manifest['apiVersion']} {manifest['kind']} is neither Kubernetes {version}'s nor a known custom "
            f"resource; give the folder of its CustomResourceDefinition as --schemas"
        )
    except kubernetes_validate.ValidationError as error:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        return f"{place.lstrip('.') or 'the object'}: {error.message}"
    except kubernetes_validate.VersionNotSupportedError:
        raise ConfigError(
            f"--kubernetes-version {version!r} is not known to kubernetes-validate; give an older one"
        ) from None
    return ""
