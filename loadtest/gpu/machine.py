"""On what something was measured: the card, the versions, the commit, the command, the day. All that a figure needs."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "diffusers")
DATASHEET_FLOP_S = {"H100": 989.4e12, "H200": 989.4e12}
"""Dense bfloat16 of the SXM parts, NVIDIA's datasheets; what MFU is a share of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    date: str
    device: str
    memory_gb: float
    versions: dict[str, str]
    commit: str
    command: str
    is_rehearsal: bool

    @classmethod
    def here(cls, command: str, *, is_rehearsal: bool, commit: str | None = None) -> About:
        """`commit`: told by who knows; None: asked of git, and "unknown" where there is none."""
        if is_rehearsal:
            device, memory = f"CPU ({platform.machine()})", 0.0
        else:
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            device, memory = properties.name, properties.total_memory / 1e9
        return cls(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            device=device,
            memory_gb=round(memory, 1),
            versions=_versions(),
            commit=commit or _commit(),
            command=command,
            is_rehearsal=is_rehearsal,
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def datasheet_flop_s(device: str) -> float | None:
    """None for a card that is not in the table."""
    return next((rate for name, rate in DATASHEET_FLOP_S.items() if name in device), None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()
