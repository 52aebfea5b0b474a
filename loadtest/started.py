"""A server that a benchmark starts: its process, what it says, and the CPU time of all that it started."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
STOP_S = 45.0


class Started:
    """A running command. Its output is read all the time; `url` is what the awaited line named."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.url = ""
        self.lines: list[str] = []
        self._unread: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """The first group of the first line from now on that matches. Raises RuntimeError when none comes."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._unread.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                said = "\n".join(self.lines[-20:])
                raise RuntimeError(f"no line with {pattern!r} came within {timeout_s:g} s:\n{said}")
            if found := re.search(pattern, line):
                return found[1]

    def cpu_s(self) -> float:
        """CPU time of the process and all below it that live."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [own := psutil.Process(self.process.pid), *own.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def ask(self, line: str, pattern: str, timeout_s: float) -> str:
        """Write a line to its standard input and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.wait_for(pattern, timeout_s)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._unread.put(line)
        self._unread.put(None)


@contextlib.contextmanager
def started(command: Sequence[str], ready: str, timeout_s: float = 180.0, **environment: str) -> Iterator[Started]:
    """`command` until the block ends, from the line that matches `ready`, whose first group is the URL."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment},
    )
    running = Started(process)
    try:
        running.url = running.wait_for(ready, timeout_s)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tandem(*arguments: str) -> list[str]:
    """`tandem serve` of this tree, on a free port."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from serve.cli import main; main()"
    return [sys.executable, "-P", "-c", code, "serve", "--port", "0", *arguments]


TANDEM_READY = r"OpenAI API\s+(\S+)/v1"
