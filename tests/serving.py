"""Start `tandem serve` as a user would, on a free port, and stop it again."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent


class Serving:
    """A running `tandem serve`: its process, its URL and what it printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._seen: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._seen.put(line)
        self._seen.put(None)

    def wait_ready(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while not self.url:
            line = self._seen.get(timeout=max(0.1, until - time.monotonic()))
            assert line is not None, "tandem serve ended:\n" + "\n".join(self.lines)
            if found := re.search(r"OpenAI API\s+(\S+)/v1", line):
                self.url = found[1]

    def children(self, part: str = "") -> list[psutil.Process]:
        """Processes started by this one; `part` picks those whose log line said so (`replica-0-0`, `gateway-0`)."""
        pids = {
            int(pid) for line in self.lines for name, pid in re.findall(r"id=(\S+) pid=(\d+)", line) if part in name
        }
        alive = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in alive if not part or process.pid in pids]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over all processes."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def serving(
    *arguments: str,
    cwd: Path | None = None,
    timeout_s: float = 120.0,
    command: Sequence[str] | None = None,
    **environment: str,
) -> Iterator[Serving]:
    """`tandem serve ARGUMENTS` on a free port, ready, until the block ends. Standard error is merged into the lines."""
    with launched(*arguments, cwd=cwd, command=command, **environment) as running:
        running.wait_ready(timeout_s)
        yield running


@contextlib.contextmanager
def launched(
    *arguments: str, cwd: Path | None = None, command: Sequence[str] | None = None, **environment: str
) -> Iterator[Serving]:
    """The same, not waited for."""
    port = () if "--port" in arguments else ("--port", "0")
    process = subprocess.Popen(
        [*(command or _command()), "serve", *port, *arguments],
        cwd=cwd or ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Serving(process)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=45)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _command() -> list[str]:
    """The `tandem` command of the package under test: the installed one, or this checkout."""
    import serve

    root = Path(next(iter(serve.__path__))).resolve().parent
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from serve.cli import main; main()"
    return [sys.executable, "-P", "-c", code]


def eventually(condition, *, within_s: float = 10.0, every_s: float = 0.05):
    """Poll until `condition()` is true and return its value; fail when it is not within the time."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {within_s} s"
        time.sleep(every_s)
    return value
