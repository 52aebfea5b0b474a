"""`/docs`: the OpenAPI description and the field table as one page without scripts and without a network."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from serve.gateway.errors import STATUS
from serve.gateway.field import PATHS, Field, Use
from serve.gateway.fields import FIELDS

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { padding: .8rem; overflow-x: auto; border-radius: 6px;
  background: color-mix(in srgb, currentColor 8%, transparent); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; }
tr { border-bottom: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
.method { font-weight: 700; } .refused { opacity: .65; }
"""
_TABLES = {path: FIELDS[endpoint] for endpoint, path in PATHS.items()}
_HEADERS = (
    ("authorization", "Bearer KEY, when the server has keys."),
    ("x-request-id", "Names the request in logs and answers: up to 128 letters, digits and . _ : -"),
    ("x-request-timeout", "Seconds for the whole answer, like the field timeout, which wins when both are given."),
)


def docs_page(openapi: dict[str, Any]) -> str:
    """The page as HTML."""
    info = openapi["info"]
    body = [f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>", f"<p>{escape(info['description'])}</p>"]
    body.append('<p>Machine-readable: <a href="/openapi.json">/openapi.json</a>.</p>')
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            body.append(_operation(path, method, operation, openapi))
    body += [_headers(), _errors()]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Tandem API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], openapi: dict[str, Any]) -> str:
    parts = [f'<h2><span class="method">{method.upper()}</span> <code>{escape(path)}</code></h2>']
    parts.append(f"<p>{escape(operation.get('summary', ''))}</p>")
    if path in _TABLES:
        parts.append(_fields(_TABLES[path]))
    elif "requestBody" in operation:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        schema = openapi["components"]["schemas"][name]
        parts.append(f"<pre>{escape(json.dumps(schema['properties'], indent=2))}</pre>")
    return "".join(parts)


def _headers() -> str:
    rows = [f"<tr><td><code>{name}</code></td><td>{escape(note)}</td></tr>" for name, note in _HEADERS]
    return f"<h2>Headers</h2><table><tr><th>Header</th><th>Meaning</th></tr>{''.join(rows)}</table>"


def _errors() -> str:
    rows = [
        f"<tr><td>{answer.status}</td><td><code>{escape(error.code)}</code></td>"
        f"<td>{escape((error.__doc__ or '').splitlines()[0])}</td></tr>"
        for error, answer in STATUS.items()
    ]
    return f"<h2>Errors</h2><table><tr><th>Status</th><th>code</th><th>When</th></tr>{''.join(rows)}</table>"


def _fields(fields: dict[str, Field]) -> str:
    rows = []
    for use in (Use.HONOURED, Use.ACCEPTED, Use.REFUSED):
        rows += [_row(entry) for entry in fields.values() if entry.use is use]
    head = "<tr><th>Field</th><th>From</th><th>Here</th><th>Meaning</th><th>Example</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _row(entry: Field) -> str:
    example = "" if entry.use is Use.REFUSED else f"<code>{escape(json.dumps(entry.example))}</code>"
    note = entry.note
    if entry.harmless:
        note += "; allowed: " + ", ".join(json.dumps(value) for value in entry.harmless)
    return (
        f'<tr class="{entry.use}"><td><code>{escape(entry.name)}</code></td><td>{escape(entry.origin)}</td>'
        f"<td>{entry.use}</td><td>{escape(note)}</td><td>{example}</td></tr>"
    )
