"""Shows on stderr how far the weights are loaded: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_EVERY_S = 0.1
_LINE_EVERY_S = 5.0
_WIDTH = 30


class LoadProgress:
    """Called with bytes done and bytes in total; `close` ends the bar's line."""

    def __init__(self, name: str, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._name = name
        self._file = file or sys.stderr
        self._clock = clock
        self._is_terminal = self._file.isatty()
        self._started = self._shown = clock()
        self._is_open = False

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        every_s = _BAR_EVERY_S if self._is_terminal else _LINE_EVERY_S
        if now - self._shown < every_s and (done < total or not self._is_terminal):
            return
        self._shown = now
        share = done / total if total else 1.0
        rate = done / max(now - self._started, 1e-9)
        figures = f"{share:4.0%} {done / 2**20:.0f}/{total / 2**20:.0f} MiB, {rate / 2**20:.0f} MiB/s"
        if self._is_terminal:
            filled = int(share * _WIDTH)
            self._file.write(f"\rloading {self._name} [{'#' * filled}{'.' * (_WIDTH - filled)}] {figures}\x1b[K")
            self._is_open = True
        else:
            self._file.write(f"loading {self._name} {figures}\n")
        self._file.flush()

    def close(self) -> None:
        if self._is_open:
            self._file.write("\n")
            self._file.flush()
            self._is_open = False
