"""Every request field of every endpoint. Validation (`schemas.py`), the docs page and the tests read this table."""

from __future__ import annotations

from serve.gateway.field import PATHS, Field
from serve.gateway.image_fields import IMAGE_FIELDS
from serve.gateway.text_fields import TEXT_FIELDS

FIELDS: dict[str, dict[str, Field]] = {
    endpoint: {entry.name: entry for entry in (*TEXT_FIELDS, *IMAGE_FIELDS) if endpoint in entry.on}
    for endpoint in PATHS
}
"""By endpoint ("chat", "completions", "images"), then by name."""
