"""The Triton kernels equal the sdpa reference in float64, by Triton's interpreter. Not seen by it: the compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(script: str, *arguments: str) -> str:
    """In a process of its own: Triton reads the variable when it is first imported, and others may have done that."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the CUDA kernels stay unchecked"
)
def test_ragged_steps_equal_the_reference_in_float64_by_the_interpreter() -> None:
    assert run("triton_cases.py", "12").startswith("29 equal")
