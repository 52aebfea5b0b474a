"""Ends what an embedded Ray leaves behind when `tandem serve` itself is killed.

Ray's processes watch each other and most follow within seconds, but its two agents first try to report the loss to a
control store that is gone as well (still there after 100 s, Ray 2.56). So a small process of its own holds a pipe from
`tandem serve`; when it closes, however that came about, the processes of that Ray that still live are killed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil

GRACE_S = 2.0
"""For those that end by themselves."""
_ROOT = Path(__file__).resolve().parent.parent.parent
_BOOT = "import sys; sys.path.insert(0, {root!r}); from serve.deployments.reaper import main; main()"


def watch_over(processes: list[psutil.Process]) -> subprocess.Popen[bytes]:
    """Start the reaper of `processes`. Keep what is returned: its pipe is this process's sign of life."""
    boot = _BOOT.format(root=str(_ROOT))
    reaper = subprocess.Popen([sys.executable, "-P", "-c", boot], stdin=subprocess.PIPE, start_new_session=True)
    assert reaper.stdin is not None
    reaper.stdin.write(json.dumps([(process.pid, process.create_time()) for process in processes]).encode() + b"\n")
    reaper.stdin.flush()
    return reaper


def main() -> None:
    """Read whom to watch over from standard input, wait for its end, then end them."""
    watched = []
    for pid, created in json.loads(sys.stdin.buffer.readline()):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:  # else the number has been given to another process
                watched.append(process)
    sys.stdin.buffer.read()
    _, left = psutil.wait_procs(watched, GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares creation times before it kills
            process.kill()
