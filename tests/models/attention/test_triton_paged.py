"""The Triton kernels equal their references, by Triton's interpreter. Not seen by it: the compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the CUDA kernels stay unchecked"
)


def run(script: str, *arguments: str) -> str:
    """In a process of its own: Triton reads the variable when it is first imported, and others may have done that."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ragged_steps_equal_the_reference_in_float64() -> None:
    assert run("triton_cases.py", "8").startswith("25 equal")


def test_keys_and_values_are_written_normed_rotated_and_quantised_as_torch_does_it() -> None:
    assert run("store_cases.py").startswith("9 equal")
