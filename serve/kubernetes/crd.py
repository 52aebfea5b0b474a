"""Custom resources: their schemas, checked as Kubernetes' API server would, defaults and CEL rules included.

`crds/` holds the schemas that Tandem's manifests need, trimmed by `read_crd`; a folder with the projects' own
CustomResourceDefinition files takes their place where one is given.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cel
import jsonschema
import yaml

Manifest = dict[str, Any]
Schema = dict[str, Any]

FOLDER = Path(__file__).parent / "crds"
_ANNOTATIONS = frozenset({"description", "format", "default", "nullable", "title", "example", "externalDocs"})


@dataclass(frozen=True)
class Crd:
    """One version of a custom resource."""

    api_version: str
    kind: str
    scope: str
    has_scale: bool
    schema: Schema
    deprecated: tuple[str, ...]
    """Older versions that are still served."""

    @property
    def validator(self) -> jsonschema.Validator:
        return _validator(self)

    def __hash__(self) -> int:
        return hash((self.api_version, self.kind))


def load(folder: Path | None = None) -> dict[str, Crd]:
    """The known custom resources by kind: those of the package, or of the CRD files (YAML) anywhere below `folder`."""
    if folder is None:
        return _shipped()
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        document = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
        if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
            crd = read_crd(document)
            found[crd.kind] = crd
    return found


def read_crd(document: dict[str, Any]) -> Crd:
    """The stored version of a CustomResourceDefinition, without descriptions."""
    spec = document["spec"]
    stored = next(version for version in spec["versions"] if version["storage"])
    schema = _without_descriptions(stored["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)  # the controllers' to write
    others = [version["name"] for version in spec["versions"] if version["served"] and not version["storage"]]
    return Crd(
        api_version=f"{spec['group']}/{stored['name']}",
        kind=spec["names"]["kind"],
        scope=spec["scope"],
        has_scale="scale" in stored.get("subresources", {}),
        schema=schema,
        deprecated=tuple(f"{spec['group']}/{name}" for name in others),
    )


def check(crd: Crd, manifest: Manifest) -> Iterator[str]:
    """What is wrong with `manifest`, a line each."""
    if manifest["apiVersion"] != crd.api_version:
        told = "deprecated" if manifest["apiVersion"] in crd.deprecated else "not served"
        yield f"apiVersion: {manifest['apiVersion']} is {told}; write {crd.api_version}"
    settled = copy.deepcopy(manifest)
    settle(settled, crd.schema)
    for error in crd.validator.iter_errors(settled):
        yield _told(error)
    yield from _break_rules(settled, crd.schema, "")


def settle(value: Any, schema: Schema) -> None:
    """Write defaults into `value` and drop nulls, as the API server does before it validates."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in [name for name, held in value.items() if held is None]:
            if not properties.get(name, {}).get("nullable"):
                del value[name]
        for name, inner in properties.items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
        for name, held in value.items():
            inner = properties.get(name, schema.get("additionalProperties"))
            if isinstance(inner, dict):
                settle(held, inner)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for held in value:
            settle(held, schema["items"])


@cache
def _shipped() -> dict[str, Crd]:
    loaded = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    crds = (Crd(**{**entry, "deprecated": tuple(entry["deprecated"])}) for entry in loaded)
    return {crd.kind: crd for crd in crds}


@cache
def _validator(crd: Crd) -> jsonschema.Validator:
    schema = strict(crd.schema)
    properties = schema["properties"]
    properties["apiVersion"], properties["kind"] = {"type": "string"}, {"const": crd.kind}
    properties["metadata"] = {"type": "object"}  # names and labels are checked for every kind alike
    return jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> Any:
    """OpenAPI's dialect as JSON Schema, in which unknown fields are errors; the API server drops them and warns."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out: Schema = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            out[key] = {name: strict(inner) for name, inner in value.items()}
        elif key == "enum" or (key not in _ANNOTATIONS and not key.startswith("x-kubernetes-")):
            out[key] = strict(value) if key not in ("enum", "const", "required", "pattern") else value
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if "properties" in schema and schema.get("type") == "object" and not is_open:
        out.setdefault("additionalProperties", False)
    return out


def _told(error: jsonschema.ValidationError) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    message = error.message if len(error.message) < 300 else f"{error.validator} {error.validator_value!r} is not met"
    return f"{place or 'the object'}: {message}"


def _break_rules(value: Any, schema: Schema, place: str) -> Iterator[str]:
    """The schema's CEL rules that do not hold, here and below. Rules about a change (`oldSelf`) need two versions."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{place or 'the object'}: {rule.get('message') or 'does not hold: ' + rule['rule']}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for name, held in value.items():
            inner = properties.get(name, schema.get("additionalProperties"))
            if isinstance(inner, dict):
                yield from _break_rules(held, inner, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, held in enumerate(value):
            yield from _break_rules(held, schema["items"], f"{place}[{index}]")


@cache
def _program(rule: str) -> Any:
    return cel.compile(rule)


def _holds(rule: str, value: Any) -> bool:
    context = cel.Context()
    context.add_variable("self", value)
    return bool(_program(rule).execute(context))


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_descriptions(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_descriptions(value)
        for key, value in node.items()
        if not (key == "description" and isinstance(value, str))
    }


def main() -> None:
    """`python -m serve.kubernetes.crd FOLDER`: write the package's copies from CRD files of the kinds it has."""
    kinds = {json.loads(path.read_text())["kind"]: path for path in FOLDER.glob("*.json")}
    for kind, crd in load(Path(sys.argv[1])).items():
        if kind in kinds:
            kinds[kind].write_text(json.dumps(dataclasses.asdict(crd), separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
