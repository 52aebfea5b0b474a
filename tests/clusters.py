"""A Ray cluster of several nodes in this process, for tests that kill parts of it (`loadtest/cluster.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from serving import eventually
from tiny import tiny_folder

from loadtest.drills import Site, started


@contextmanager
def drilled(directory: Path, num_tokens: int) -> Iterator[Site]:
    """Three nodes and two replicas of a tiny model under twenty clients; no process is left afterwards."""
    folder = tiny_folder(directory, "qwen3", num_hidden_layers=2, max_position_embeddings=4096)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with started({"model": str(folder), "threads": 1, "dtype": "float32"}, num_tokens) as site:
        yield site
    eventually(lambda: not [c for c in psutil.Process().children(recursive=True) if c.pid not in before], within_s=30)
