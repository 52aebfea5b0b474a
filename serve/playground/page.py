"""The playground as one self-contained page, put together from the files beside this one when the gateway starts.

`index.html` holds the markup; the style sheet and the scripts go into it where their marks stand, so nothing is loaded
from anywhere else and a security policy can name the one script by its hash.
"""

from __future__ import annotations

from importlib import resources

STYLES = ("style.css", "images.css")
SCRIPTS = (
    "dom.js", "api.js", "settings.js",
    "markdown.js", "turn.js", "chat.js",
    "picture.js", "generation.js", "gallery.js", "viewer.js", "size.js", "images.js",
    "tabs.js", "app.js",
)  # fmt: skip
"""In this order: they share one scope."""


def render() -> str:
    """The page's HTML."""
    style = "\n".join(map(_read, STYLES))
    script = "\n".join(['"use strict";', *map(_read, SCRIPTS)])
    return _read("index.html").replace("/* STYLE */", style).replace("/* SCRIPT */", script)


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
