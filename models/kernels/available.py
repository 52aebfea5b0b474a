"""Where Triton's kernels compute. Files beside this one import Triton, so they are imported only where this says so."""

from __future__ import annotations

import importlib.util
import os

import torch


def has_kernels(device: torch.device) -> bool:
    """On CUDA where Triton is installed, and anywhere under its interpreter (`TRITON_INTERPRET=1`), which tests use."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return importlib.util.find_spec("triton") is not None
