"""Where the embedded models lie in the installed package. Imports nothing heavy."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent

EMBEDDED: dict[str, Path] = {name: FOLDER / name for name in ("tandem-text", "tandem-text-draft")}
"""Folder of each embedded text model, in the standard layout of transformers."""
