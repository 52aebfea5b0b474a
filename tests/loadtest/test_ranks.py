"""The benchmark of the hand-over runs and says what it measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_case_gives_a_row():
    arguments = ["--peers", "1", "--sequences", "2", "--prompt", "64", "--steps", "3", "--pause-ms", "0"]
    command = [sys.executable, "-m", "loadtest.ranks", *arguments, "--paths", "shared memory"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["1", "shared memory", "2 decodes"], ["1", "shared memory", "prefill of 64"]]
