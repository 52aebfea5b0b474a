"""The two ways a kustomization changes an object: strategic merge, and JSON 6902 operations.

A strategic merge joins mappings, and the lists of built-in kinds whose elements have a key (a pod's containers by
name); every other list is replaced, in custom resources all of them, as kustomize does for kinds without a schema.
"""

from __future__ import annotations

import copy
from typing import Any

_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
}
_BUILT_IN = frozenset({"apps", "autoscaling", "batch", "networking.k8s.io", "policy", "rbac.authorization.k8s.io"})


class PatchError(Exception):
    """A patch that does not fit the object it is for."""


def merge(manifest: dict[str, Any], patch: dict[str, Any]) -> None:
    """Strategic merge of `patch` into `manifest`. Raises PatchError."""
    group = manifest["apiVersion"].rpartition("/")[0]
    _merge_mapping(manifest, copy.deepcopy(patch), has_keys=not group or group in _BUILT_IN)


def apply_operations(manifest: dict[str, Any], operations: list[dict[str, Any]]) -> None:
    """`add`, `replace`, `remove` and `test` of RFC 6902. Raises PatchError."""
    for operation in operations:
        kind, pointer = operation.get("op"), operation.get("path", "")
        try:
            if kind not in ("add", "replace", "remove", "test"):
                raise PatchError(f"the operation {kind!r} is not known; use add, replace, remove or test")
            _operate(manifest, kind, pointer, copy.deepcopy(operation.get("value")))
        except (KeyError, IndexError, ValueError, TypeError):
            raise PatchError(f"{kind} {pointer}: there is no such place") from None


def _operate(manifest: dict[str, Any], kind: str, pointer: str, value: Any) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    node: Any = manifest
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if isinstance(node, list):
        _operate_list(node, kind, pointer, last, value)
    elif kind == "add":
        node[last] = value
    elif kind == "replace":
        if last not in node:
            raise KeyError(last)
        node[last] = value
    elif kind == "remove":
        del node[last]
    elif node[last] != value:
        raise PatchError(f"test {pointer}: found {node[last]!r}, expected {value!r}")


def _operate_list(node: list[Any], kind: str, pointer: str, last: str, value: Any) -> None:
    if kind == "add":
        index = len(node) if last == "-" else int(last)
        if index > len(node):
            raise IndexError(index)
        node.insert(index, value)
    elif kind == "replace":
        node[int(last)] = value
    elif kind == "remove":
        del node[int(last)]
    elif node[int(last)] != value:
        raise PatchError(f"test {pointer}: found {node[int(last)]!r}, expected {value!r}")


def _merge_mapping(target: dict[str, Any], patch: dict[str, Any], *, has_keys: bool) -> None:
    for name, value in patch.items():
        if name.startswith("$"):
            raise PatchError(f"the directive {name!r} is not known here; use operations")
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge_mapping(target[name], value, has_keys=has_keys)
        elif isinstance(value, list) and isinstance(target.get(name), list) and has_keys and name in _KEYS:
            _merge_list(target[name], value, _KEYS[name])
        else:
            target[name] = value


def _merge_list(target: list[Any], patch: list[Any], key: str) -> None:
    """Elements of the same key are merged, new ones come first, as kustomize puts them."""
    known = {element[key]: element for element in target}
    new = []
    for element in patch:
        if element.get("$patch") == "delete":
            target[:] = [other for other in target if other[key] != element[key]]
        elif element[key] in known:
            _merge_mapping(known[element[key]], element, has_keys=True)
        else:
            new.append(element)
    target[:0] = new
