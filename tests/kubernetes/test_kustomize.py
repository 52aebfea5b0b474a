"""The builder does what kustomize does, where it does anything."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from broken_manifests import K8S, OVERLAYS, good

from serve.kubernetes.kustomize import KustomizeError, build, content_hash, identity, split_image
from serve.kubernetes.patch import PatchError, apply_operations, merge


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl: our build is not compared with kustomize's own"
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_built_as_kubectl_builds_it(overlay):
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {identity(m): m for m in good(overlay)} == {identity(m): m for m in yaml.safe_load_all(theirs)}


def test_the_hash_of_a_config_map_is_kustomizes():
    """As `kubectl kustomize` 5.5 writes them."""
    assert content_hash({"data": {"a": "b"}}) == "4h2mbtbbt6"
    assert content_hash({"data": {"f": "hello\n"}}) == "mmcff2bbm4"


def test_a_patch_of_one_group_leaves_the_other_alone_where_the_file_shares_them_by_an_alias(tmp_path):
    (tmp_path / "ray.yaml").write_text(
        "apiVersion: ray.io/v1\nkind: RayService\nmetadata: {name: x}\nspec: {a: &a {env: []}, b: *a}\n"
    )
    patch = "patches:\n- target: {kind: RayService}\n  patch: |\n    - {op: add, path: /spec/a/env/-, value: 1}\n"
    (tmp_path / "kustomization.yaml").write_text("resources: [ray.yaml]\n" + patch)
    [built] = build(tmp_path)
    assert built["spec"] == {"a": {"env": [1]}, "b": {"env": []}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vars: []", "'vars'"),
        ("resources: [../outside.yaml]", "outside its folder"),
        ("configMapGenerator: [{name: x, files: [../f]}]", "outside its folder"),
        ("configMapGenerator: [{name: x, behavior: merge, literals: [a=b]}]", "none of that name"),
        ("patches: [{path: p.yaml, options: {allowNameChange: true}}]", "'options'"),
        ("replicas: [{name: x, count: 2}]", "no Deployment"),
        ("kind: Component", "is a Component"),
    ],
)
def test_what_is_not_built_here_is_refused_by_name(tmp_path, line, said):
    folder = tmp_path / "overlay"
    folder.mkdir()
    (tmp_path / "outside.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: x}\n")
    (folder / "kustomization.yaml").write_text(line + "\n")
    with pytest.raises(KustomizeError, match=said):
        build(folder)


def test_a_strategic_merge_joins_containers_by_name_and_replaces_lists_of_custom_resources():
    pod = {"apiVersion": "apps/v1", "spec": {"containers": [{"name": "a", "image": "x", "args": ["1"]}]}}
    merge(pod, {"spec": {"containers": [{"name": "a", "args": ["2"]}, {"name": "b"}]}})
    assert pod["spec"]["containers"] == [{"name": "b"}, {"name": "a", "image": "x", "args": ["2"]}]
    custom = {"apiVersion": "ray.io/v1", "spec": {"containers": [{"name": "a"}], "x": 1}}
    merge(custom, {"spec": {"containers": [{"name": "b"}], "x": None}})
    assert custom["spec"] == {"containers": [{"name": "b"}]}


def test_operations_say_where_they_do_not_fit():
    with pytest.raises(PatchError, match="no such place"):
        apply_operations({"a": {}}, [{"op": "replace", "path": "/a/b", "value": 1}])
    with pytest.raises(PatchError, match="found 'models', expected 'gateway'"):
        apply_operations({"a": ["models"]}, [{"op": "test", "path": "/a/0", "value": "gateway"}])


def test_images_are_told_apart_from_ports_and_digests():
    assert split_image("registry:5000/a/b") == ("registry:5000/a/b", "", "")
    assert split_image("registry:5000/a:1@sha256:ff") == ("registry:5000/a", "1", "sha256:ff")
