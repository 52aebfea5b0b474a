"""How peers come to life. Here: as child processes of the driver; on Ray: as actors (`serve/deployments/ranks.py`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Protocol

from serve.devices import VISIBLE, visible_devices
from serve.ranks.spec import PeerSpec

_BOOT = "import sys; sys.path[:] = {path!r}; from serve.ranks.peer import main; main()"
_STANDARD_ERROR = 2


class PeerProcess(Protocol):
    """A peer's process, wherever it runs."""

    @property
    def name(self) -> str:
        """For people: `pid 4711`."""
        ...

    def wait(self, timeout_s: float) -> str | None:
        """How it ended ("exit status 1"); None when it still lives after `timeout_s`."""
        ...

    def kill(self) -> None:
        """End it, whatever it is doing or however it hangs. Any number of times."""
        ...


class Launcher(Protocol):
    """Starts peers."""

    host: str | None
    """The driver's address for peers on other nodes; None: all peers share this node."""
    directory: str | None
    """Where the group's own directory is made; None: where temporary files are."""

    def devices(self, kind: str, num_ranks: int) -> tuple[str, ...]:
        """Each rank's device of this kind (`cpu` or `cuda`), as its own process names it, which sees that one only."""
        ...

    def is_here(self, rank: int, driver_rank: int) -> bool:
        """Whether that rank shares the memory of the driver's node."""
        ...

    def launch(self, spec: PeerSpec) -> PeerProcess: ...


class LocalLauncher:
    """Peers as children of this process, in its process group, which import the very files that it imports."""

    host: str | None = None

    def __init__(self, directory: str | None = None):
        """`directory`: one that somebody removes even when this process is killed while it starts."""
        self.directory = directory

    def devices(self, kind: str, num_ranks: int) -> tuple[str, ...]:
        return ("cpu" if kind == "cpu" else "cuda:0",) * num_ranks

    def is_here(self, rank: int, driver_rank: int) -> bool:
        return True

    def launch(self, spec: PeerSpec) -> PeerProcess:
        boot = _BOOT.format(path=[os.path.abspath(path) for path in sys.path])
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}
        if spec.device != "cpu":  # the driver takes the first it sees, whatever its rank
            environment[VISIBLE] = visible_devices()[spec.rank + (spec.rank < spec.driver_rank)]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", boot],
            stdin=subprocess.PIPE,
            stdout=_STANDARD_ERROR,  # the driver's standard output speaks to its own parent
            env=environment,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(spec.to_json().encode() + b"\n")
        return _Child(process)


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process

    @property
    def name(self) -> str:
        return f"pid {self._process.pid}"

    def wait(self, timeout_s: float) -> str | None:
        try:
            return _ending(self._process.wait(timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    hint = "; was the memory short?" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
