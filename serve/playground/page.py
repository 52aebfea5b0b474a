"""The playground as one self-contained page, put together from the files beside this one when the gateway starts.

`index.html` holds the markup; the style sheet and the scripts go into it where their marks stand. Nothing is loaded
from anywhere else, so the page's content security policy can name the hashes of exactly this style and this script.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources

STYLES = ("style.css",)
SCRIPTS = ("dom.js", "markdown.js", "api.js", "settings.js", "turn.js", "chat.js", "app.js")
"""In this order: they share one scope."""


@dataclass(frozen=True, slots=True)
class Page:
    html: bytes
    content_security_policy: str
    """The value of the header to send with it."""


def load() -> Page:
    """Read the files and put the page together."""
    style = "\n" + "\n".join(map(_read, STYLES))
    script = '\n"use strict";\n' + "\n".join(map(_read, SCRIPTS))
    html = _read("index.html").replace("/* STYLE */", style).replace("/* SCRIPT */", script)
    policy = (
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return Page(html.encode(), "; ".join(policy))


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
