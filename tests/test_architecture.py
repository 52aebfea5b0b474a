"""The design's import rules, read from the source and checked in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.gpu.command import PARTS

ROOT = Path(__file__).resolve().parent.parent
THIRD_PARTY_RULES = {
    # package: the only places that may import it
    "ray": ("serve/deployments/", "loadtest/ray_baseline.py", "loadtest/cluster.py"),
    "fastapi": ("serve/gateway/",),
    "starlette": ("serve/gateway/", "loadtest/ray_baseline.py"),
    "uvicorn": ("serve/gateway/",),
    "pydantic": ("serve/gateway/", "serve/config.py", "serve/deployments/serve_config.py"),
    "diffusers": ("models/dit/", "models/embedded/"),
    "transformers": ("models/", "loadtest/"),
    "llguidance": ("serve/text/grammar",),
    "opentelemetry": ("serve/tracing.py",),
}
FORBIDDEN = {
    # files: what they never import, directly
    "models/": ("serve",),
    "serve/engine/": ("torch", "transformers", "serve.text", "serve.image", "serve.gateway", "serve.deployments"),
    "serve/ranks/": ("serve.engine", "serve.text", "serve.image", "serve.gateway", "serve.deployments"),
    "serve/gateway/": ("torch", "transformers", "models", "serve.engine", "serve.deployments", "serve.image"),
    "serve/text/": ("serve.gateway", "serve.deployments", "serve.image"),
    "serve/text/scheduler.py": ("torch", "models"),
    "serve/text/kv_cache.py": ("torch", "models"),
    "serve/text/sequence.py": ("torch", "models"),
    "serve/text/tokenizer.py": ("torch", "transformers", "models"),
    "serve/text/detokenizer.py": ("torch", "transformers", "models"),
    "serve/text/chat_template.py": ("torch", "transformers", "models"),
    "serve/image/": ("serve.text", "serve.gateway", "serve.deployments"),
    "serve/image/scheduler.py": ("torch", "models"),
    "serve/image/trajectory.py": ("torch", "models"),
    "serve/image/limits.py": ("torch", "models"),
    "loadtest/": ("fastapi",),
}
TORCH_FREE = (
    "serve.engine.engine",
    "serve.text.scheduler",
    "serve.image.scheduler",
    "serve.text.tokenizer",
    "serve.gateway.app",
    "serve.gateway.gateway",
    "serve.channel",
    "serve.hub",
    "serve.cli",
    "serve.preflight",
    "serve.ranks.group",
    "serve.ranks.peer",
    "models.source",
)
BARE_GPU_BOX = (
    *("ray", "pydantic", "fastapi", "starlette", "uvicorn", "msgspec", "diffusers", "prometheus_client", "llguidance"),
    "opentelemetry",
)
MAX_LINES = 400


def sources() -> list[Path]:
    return [path for folder in ("serve", "models", "loadtest") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", sorted(THIRD_PARTY_RULES))
def test_heavy_packages_are_imported_only_at_their_edge(package):
    allowed = THIRD_PARTY_RULES[package]
    strays = [
        relative(path)
        for path in sources()
        if not relative(path).startswith(allowed) and any(is_in(module, package) for module in imports(path))
    ]
    assert not strays, f"{package} may be imported only in {allowed}"


@pytest.mark.parametrize("place", sorted(FORBIDDEN))
def test_layers_do_not_reach_up_or_sideways(place):
    strays = [
        f"{relative(path)} imports {module}"
        for path in sources()
        if relative(path).startswith(place)
        for module in imports(path)
        if any(is_in(module, package) for package in FORBIDDEN[place])
    ]
    assert not strays


def test_package_inits_are_empty():
    assert [relative(path) for path in sources() if path.name == "__init__.py" and path.read_text().strip()] == []


def test_no_file_holds_two_nouns():
    assert [relative(path) for path in sources() if len(path.read_text().splitlines()) > MAX_LINES] == []


def test_nothing_unpickles_what_comes_from_outside():
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert [relative(path) for path in sources() if imports(path) & banned] == []


def test_no_security_check_is_an_assert_in_the_gateway():
    """`python -O` removes asserts: the gateway and the wire must not rely on one to refuse input."""
    places = [path for path in sources() if relative(path).startswith(("serve/gateway/", "serve/wire.py"))]
    strays = [
        relative(path)
        for path in places
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not strays


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_loads_without_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_engine_runs_where_only_torch_exists():
    """A bare GPU box has torch, transformers, safetensors, numpy and pillow, and nothing of the serving plane."""
    hide = f"import sys; [sys.modules.__setitem__(name, None) for name in {BARE_GPU_BOX!r}]; "
    modules = "loadtest.engine, loadtest.images, serve.text.build, serve.image.build, models.registry"
    modules += ", serve.ranks.group, serve.ranks.peer, loadtest.ranks, loadtest.gpu.first_token"
    modules += "".join(f", loadtest.gpu.{part}" for part in ("command", *PARTS))
    subprocess.run([sys.executable, "-c", hide + "import " + modules], check=True, cwd=ROOT)
