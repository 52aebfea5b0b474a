"""`kustomize build` for the part of kustomize that Tandem's manifests use, so that they can be checked without it.

    build("k8s/overlays/production")  ->  the objects that `kubectl apply -k` would send

Known are resources, components, patches, ConfigMap generators with their name hashes, images, labels, replicas,
namespace, and nameReference configurations. Any other field is refused: a build that leaves something out in silence
would prove nothing. Order of work and the hash follow kustomize 5 (`api/internal/target/kusttarget.go`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from serve.kubernetes.patch import PatchError, apply_operations, merge

Manifest = dict[str, Any]

FILE = "kustomization.yaml"
CLUSTER_SCOPED = frozenset(
    {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "GatewayClass", "PersistentVolume"}
    | {"PriorityClass", "RuntimeClass", "StorageClass"}
)
_KNOWN = frozenset(
    {"apiVersion", "kind", "resources", "components", "patches", "configMapGenerator", "generatorOptions", "images"}
    | {"labels", "replicas", "namespace", "configurations"}
)
_HASHED = "configMap/name", "configMapRef/name", "configMapKeyRef/name"
"""Where pods name ConfigMaps, by the last two keys of the path: known to kustomize for the built-in kinds."""


class KustomizeError(Exception):
    """What cannot be built, with the file that asks for it."""


@dataclass
class _Build:
    """What has been gathered so far: by the root, its resources and its components."""

    objects: list[Manifest] = field(default_factory=list)
    generated: set[int] = field(default_factory=set)
    """Ids of the objects whose names get the hash of their content."""
    references: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """(kind, path) of further places that name a ConfigMap."""


def build(directory: Path) -> list[Manifest]:
    """The objects of the kustomization in `directory`. Raises KustomizeError."""
    gathered = _Build()
    _accumulate(directory, gathered, is_component=False)
    _hash_names(gathered)
    seen = set()
    for manifest in gathered.objects:
        name = identity(manifest)
        if name in seen:
            raise KustomizeError(f"{directory / FILE}: {name} is defined twice")
        seen.add(name)
    return gathered.objects


def identity(manifest: Manifest) -> str:
    """`Kind/name`: how messages speak of an object."""
    return f"{manifest.get('kind', '?')}/{manifest.get('metadata', {}).get('name', '?')}"


def load_documents(path: Path) -> list[Manifest]:
    """The objects of a YAML file. Raises KustomizeError."""
    try:
        documents = _documents(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise KustomizeError(f"{path}: cannot be read: {error}") from None
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
            raise KustomizeError(f"{path}: holds something without apiVersion, kind and metadata")
    return documents


def _documents(text: str | bytes) -> list[Any]:
    return [_unshared(loaded) for loaded in yaml.load_all(text, Loader=yaml.CSafeLoader) if loaded]


def _unshared(node: Any) -> Any:
    """A copy in which what YAML aliases share is there once for each, so that a patch changes one place only."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _accumulate(directory: Path, into: _Build, *, is_component: bool) -> None:
    """Resources, then generators, then components, then what changes them all: kustomize's own order."""
    path = directory / FILE
    spec = _read(path, is_component)
    for name in spec.get("resources", ()):
        _resource(path, (directory / name).resolve(), into)
    for name in spec.get("configurations", ()):
        into.references += _name_references(directory / name)
    for generator in spec.get("configMapGenerator", ()):
        _generate(path, generator, spec.get("generatorOptions", {}), into)
    for name in spec.get("components", ()):
        _accumulate((directory / name).resolve(), into, is_component=True)
    for patch in spec.get("patches", ()):
        _patch(path, patch, into.objects)
    _set_namespace(spec.get("namespace"), into.objects)
    for label in spec.get("labels", ()):
        _expect(path, "labels", label, {"pairs"})
        for manifest in into.objects:
            manifest["metadata"].setdefault("labels", {}).update(label["pairs"])
    for count in spec.get("replicas", ()):
        _scale(path, count, into.objects)
    for image in spec.get("images", ()):
        _expect(path, "images", image, {"name", "newName", "newTag", "digest"})
        for manifest in into.objects:
            _each_container(manifest, partial(_set_image, image))


def _read(path: Path, is_component: bool) -> dict[str, Any]:
    try:
        spec = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise KustomizeError(f"{path}: cannot be read: {error}") from None
    kind = "Component" if is_component else "Kustomization"
    if spec.get("kind", "Kustomization") != kind:
        raise KustomizeError(f"{path}: is a {spec.get('kind')}, and a {kind} is needed where it is named")
    _expect(path, "kustomization", spec, _KNOWN)
    return dict(spec)


def _expect(path: Path, what: str, given: dict[str, Any], known: set[str] | frozenset[str]) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        raise KustomizeError(
            f"{path}: {what} has the field {unknown[0]!r}, which is not built here (known are "
            f"{', '.join(sorted(known))}); render it with `kustomize build` and check the file it writes"
        )


def _resource(parent: Path, path: Path, into: _Build) -> None:
    if path.is_dir():
        inner = _Build()
        _accumulate(path, inner, is_component=False)
        into.objects += inner.objects
        into.generated |= inner.generated
        into.references += inner.references
    elif path.parent.is_relative_to(parent.parent.resolve()):
        into.objects += load_documents(path)
    else:
        raise KustomizeError(f"{parent}: {path} lies outside its folder; kustomize takes only folders from there")


def _name_references(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    spec = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    _expect(path, "configurations", spec, {"nameReference"})
    for reference in spec["nameReference"]:
        if reference["kind"] != "ConfigMap":
            raise KustomizeError(
                f"{path}: nameReference is for {reference['kind']}; only ConfigMaps get new names here"
            )
        for place in reference["fieldSpecs"]:
            yield place["kind"], tuple(place["path"].split("/"))


def _generate(path: Path, spec: dict[str, Any], options: dict[str, Any], into: _Build) -> None:
    _expect(path, "configMapGenerator", spec, {"name", "files", "literals", "behavior", "options"})
    _expect(path, "generatorOptions", options, {"disableNameSuffixHash", "labels"})
    data = dict(_file_entry(path, entry) for entry in spec.get("files", ()))
    data |= dict(literal.partition("=")[::2] for literal in spec.get("literals", ()))
    settings = {**options, **spec.get("options", {})}
    behavior = spec.get("behavior", "create")
    existing = [m for m in into.objects if identity(m) == f"ConfigMap/{spec['name']}"]
    if (behavior == "create") == bool(existing):
        raise KustomizeError(
            f"{path}: configMapGenerator {spec['name']!r} says {behavior}, and there is "
            f"{'one of that name already' if existing else 'none of that name'}"
        )
    if existing:
        existing[0]["data"] = {**(existing[0]["data"] if behavior == "merge" else {}), **data}
        return
    manifest: Manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": spec["name"]}, "data": data}
    if settings.get("labels"):
        manifest["metadata"]["labels"] = dict(settings["labels"])
    into.objects.append(manifest)
    if not settings.get("disableNameSuffixHash"):
        into.generated.add(id(manifest))


def _file_entry(path: Path, entry: str) -> tuple[str, str]:
    key, _, name = entry.rpartition("=")
    file = (path.parent / name).resolve()
    if not file.is_relative_to(path.parent.resolve()):
        raise KustomizeError(f"{path}: {name!r} lies outside its folder, which kustomize does not read from there")
    try:
        return key or file.name, file.read_text(encoding="utf-8")
    except OSError as error:
        raise KustomizeError(f"{path}: {name!r} cannot be read: {error.strerror}") from None


def _patch(path: Path, spec: dict[str, Any], objects: list[Manifest]) -> None:
    _expect(path, "patches", spec, {"path", "patch", "target"})
    text = (path.parent / spec["path"]).read_text(encoding="utf-8") if "path" in spec else spec["patch"]
    for patch in _documents(text):
        target = spec.get("target")
        if target is None:
            if isinstance(patch, list):
                raise KustomizeError(f"{path}: a patch of operations has no target; name one")
            target = {"kind": patch["kind"], "name": re.escape(patch["metadata"]["name"])}
        chosen = [index for index, manifest in enumerate(objects) if _is_target(path, target, manifest)]
        if not chosen and "name" in target:  # by kind alone a component may serve several workloads
            raise KustomizeError(f"{path}: a patch for {target} has nothing to change")
        for index in chosen:
            try:
                if isinstance(patch, list):
                    apply_operations(objects[index], patch)
                else:
                    merge(objects[index], patch)
            except PatchError as error:
                raise KustomizeError(f"{path}: {identity(objects[index])}: {error}") from None


def _is_target(path: Path, target: dict[str, str], manifest: Manifest) -> bool:
    _expect(path, "a patch's target", target, {"group", "version", "kind", "name", "labelSelector"})
    group, _, version = manifest["apiVersion"].rpartition("/")
    own = {"group": group, "version": version, "kind": manifest["kind"], "name": manifest["metadata"]["name"]}
    labels = manifest["metadata"].get("labels", {})
    wanted = dict(part.split("=") for part in target.get("labelSelector", "").split(",") if part)
    return all(re.fullmatch(target[key], own[key]) for key in own if key in target) and wanted.items() <= labels.items()


def _set_namespace(namespace: str | None, objects: list[Manifest]) -> None:
    for manifest in objects if namespace else ():
        if manifest["kind"] not in CLUSTER_SCOPED:
            manifest["metadata"]["namespace"] = namespace


def _scale(path: Path, count: dict[str, Any], objects: list[Manifest]) -> None:
    wanted = f"Deployment/{count['name']}", f"StatefulSet/{count['name']}"
    found = [manifest for manifest in objects if identity(manifest) in wanted]
    if not found:
        raise KustomizeError(f"{path}: replicas names {count['name']!r}, which is no Deployment or StatefulSet here")
    for manifest in found:
        manifest["spec"]["replicas"] = count["count"]


def _each_container(node: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Every container in pods at any depth, as kustomize's image transformer finds them in any kind."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    change(container)
            else:
                _each_container(value, change)
    elif isinstance(node, list):
        for value in node:
            _each_container(value, change)


def split_image(image: str) -> tuple[str, str, str]:
    """(name, tag, digest) of an image reference."""
    name, _, digest = image.partition("@")
    head, colon, tag = name.rpartition(":")
    return (head, tag, digest) if colon and "/" not in tag else (name, "", digest)


def _set_image(change: dict[str, str], container: dict[str, Any]) -> None:
    name, tag, digest = split_image(container.get("image", ""))
    if name != change["name"]:
        return
    if "newTag" in change or "digest" in change:
        tag, digest = change.get("newTag", ""), change.get("digest", "")
    container["image"] = change.get("newName", name) + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


def _hash_names(gathered: _Build) -> None:
    """Give generated ConfigMaps the hash of their content, and every reference to them the new name."""
    renamed: dict[str, str] = {}
    for manifest in gathered.objects:
        if id(manifest) in gathered.generated:
            name = manifest["metadata"]["name"]
            renamed[name] = manifest["metadata"]["name"] = f"{name}-{content_hash(manifest)}"
    for manifest in gathered.objects:
        if "/" not in manifest["apiVersion"] or manifest["apiVersion"].split("/")[0] in ("apps", "batch"):
            _rename_in(manifest, renamed, ())
        for kind, path in gathered.references:
            if manifest["kind"] == kind:
                _rename_at(manifest, path, renamed)


def _rename_in(node: Any, renamed: dict[str, str], path: tuple[str, ...]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if "/".join((*path, key)[-2:]) in _HASHED and value in renamed:
                node[key] = renamed[value]
            else:
                _rename_in(value, renamed, (*path, key))
    elif isinstance(node, list):
        for value in node:
            _rename_in(value, renamed, path)


def _rename_at(node: Any, path: tuple[str, ...], renamed: dict[str, str]) -> None:
    if isinstance(node, list):
        for value in node:
            _rename_at(value, path, renamed)
    elif isinstance(node, dict) and path[0] in node:
        if len(path) == 1:
            node[path[0]] = renamed.get(node[path[0]], node[path[0]])
        else:
            _rename_at(node[path[0]], path[1:], renamed)


def content_hash(manifest: Manifest) -> str:
    """kustomize's ten characters (`api/hasher/hasher.go`): SHA-256 of Go's JSON, with fewer vowels. The name is not in
    it, as `kubectl kustomize` shows."""
    content = {"data": manifest.get("data", ""), "kind": "ConfigMap", "name": ""}
    text = json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    for character in "<>&\u2028\u2029":  # as Go's encoder writes them
        text = text.replace(character, f"\\u{ord(character):04x}")
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return digest.translate(str.maketrans("013ae", "ghkmt"))
