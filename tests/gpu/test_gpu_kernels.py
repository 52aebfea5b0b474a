"""On a CUDA device: the fused kernels as the compiler makes them, within the errors they state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: the fused kernels are checked by the interpreter only, whose roundings are its own",
    ),
]


@pytest.mark.parametrize(("script", "count"), [("kernel_cases.py", 4), ("dit_cases.py", 4)])
def test_compiled_kernels_stay_within_their_stated_errors(script: str, count: int) -> None:
    if script == "dit_cases.py":
        pytest.importorskip("diffusers", reason="no diffusers: its blocks are not compared")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "models" / "kernels" / script],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("within bounds") + done.stdout.count("equal") == count
