"""A jinja2 environment in which a model's chat template can neither escape nor run away.

Escape is what jinja2's `ImmutableSandboxedEnvironment` prevents. Running away (endless loops, strings that double) it
does not, so every loop and call here spends from a `Budget`, and everything that makes text or lists longer is checked
before it does. Filters, globals and tags are those of transformers' chat templates, so the output is equal.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

MAX_STEPS = 1_000_000
"""Loop rounds and calls of one rendering. A thousand messages through a large template take about 30,000."""
MAX_CHARS = 32 * 2**20
"""Of one rendering, and of any text on the way to it."""
MAX_ITEMS = 1_000_000
"""Of a list, and the largest number given to a filter or method: a width, a count."""
MAX_RENDER_S = 10.0


class TemplateLimit(jinja2.TemplateError):
    """The template loops too long or makes too much text."""


@dataclass(slots=True)
class Budget:
    """What one rendering may still spend."""

    num_steps: int = MAX_STEPS
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_RENDER_S)

    def step(self) -> None:
        self.num_steps -= 1
        if self.num_steps < 0:
            raise TemplateLimit(f"the chat template takes more than {MAX_STEPS} steps")
        if self.num_steps % 64 == 0 and time.monotonic() > self.deadline:
            raise TemplateLimit(f"the chat template takes more than {MAX_RENDER_S:g} s")


_budget: ContextVar[Budget | None] = ContextVar("chat_template_budget", default=None)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The template's text, within a fresh budget. Raises `jinja2.TemplateError`, or what its operations raise."""
    token = _budget.set(Budget())
    try:
        return _bounded_join(template.generate(variables))
    finally:
        _budget.reset(token)


def _spend() -> None:
    budget = _budget.get()
    if budget is not None:
        budget.step()


def _check_chars(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise TemplateLimit(f"the chat template makes more than {MAX_CHARS} characters")


def _bounded_join(parts: Iterable[str]) -> str:
    out, num_chars = [], 0
    for part in parts:
        num_chars += len(part)
        _check_chars(num_chars)
        out.append(part)
    return "".join(out)


def _bounded_loop(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend()
        yield item


def _bounded_text(text: Any) -> Any:
    if isinstance(text, str):
        _check_chars(len(text))
    return text


def _check_growth(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a filter or method call that could make far more text than it was given."""
    values = [*args, *kwargs.values()]
    if any(isinstance(value, int) and abs(value) > MAX_ITEMS for value in values):
        raise TemplateLimit(f"{name} with a number over {MAX_ITEMS}")
    texts = [len(value) for value in values if isinstance(value, str)]
    if name in ("replace", "join", "indent", "translate", "expandtabs") and texts:
        sizes = [len(value) for value in values if isinstance(value, (str, list, tuple))]
        _check_chars((sizes[0] + 1) * max(sizes[1:], default=1) if max(sizes) > 4096 else 0)
    if name in ("format", "format_map", "strftime_now") and _LONG_NUMBER.search(str(values[0])):
        raise TemplateLimit(f"{name} with a width of more than three digits")


_LONG_NUMBER = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)|\{[^{}]*\d{4}")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps jinja2's mark for functions that take the context first
    def checked(*args: Any, **kwargs: Any) -> Any:
        _spend()
        _check_growth(name, args, kwargs)
        return _bounded_text(function(*args, **kwargs))

    return checked


class _Bounds(jinja2.visitor.NodeTransformer):
    """Puts the budget into a template's syntax tree: around what loops iterate over and around `~`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = jinja2.nodes.Filter(node.iter, "bounded_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return jinja2.nodes.Filter(node, "bounded_text", [], [], None, None, lineno=node.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body)]


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, as in transformers: no way to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=…)` works
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute must not begin with an underscore: {name!r}")


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_bounded_join)  # joins the parts of macros and block assignments

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.filters |= {"bounded_loop": _bounded_loop, "bounded_text": _bounded_text}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Bounds().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        _spend()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, list)):
            _check_growth(function.__name__, (owner, *args), kwargs)
        elif function is self.globals["strftime_now"]:
            _check_growth("strftime_now", args, kwargs)
        return _bounded_text(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _spend()
        if operator == "+" and isinstance(left, (list, tuple)) and len(left) + len(right) > MAX_ITEMS:
            raise TemplateLimit(f"a list of more than {MAX_ITEMS} items")
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4096:
            raise TemplateLimit("a power of more than 4096 bits")
        if operator == "%" and isinstance(left, str):
            _check_growth("format", (left,), {})
        return _bounded_text(super().call_binop(context, operator, left, right))


def _check_product(left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int) and len(sequence) * count > MAX_ITEMS:
            raise TemplateLimit(f"a repetition to more than {MAX_ITEMS} items")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
        raise TemplateLimit("a product of more than 4096 bits")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja2's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
