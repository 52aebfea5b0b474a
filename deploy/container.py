"""A stage's file system run as its image says, without a container engine: user, environment, working directory, entry
point and command are the Dockerfile's own lines.

Stricter than an engine's defaults, and as the manifests want it: a read-only root, no capabilities, no new privileges,
no network but loopback, its own processes, and memory file systems at /tmp, HOME and /dev/shm only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.dockerfile import Dockerfile


@dataclass(frozen=True, slots=True)
class Image:
    """A built stage and what its instructions say of running it."""

    dockerfile: Dockerfile
    stage: str
    root: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of the image's own, as `docker run --env` gives it."""

    @property
    def user(self) -> tuple[int, int]:
        instruction = self.dockerfile.last(self.stage, "USER")
        uid, _, gid = instruction.text.partition(":") if instruction else ("0", ":", "0")
        return int(uid), int(gid)

    def words(self, name: str) -> list[str]:
        """Of ENTRYPOINT, CMD or the command of HEALTHCHECK."""
        instruction = self.dockerfile.last(self.stage, name)
        if instruction is None:
            return []
        if name == "HEALTHCHECK":
            return [str(word) for word in json.loads(instruction.text.removeprefix("CMD "))]
        return instruction.words()

    @property
    def as_user(self) -> list[str]:
        uid, gid = self.user
        return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]

    @property
    def all_environment(self) -> dict[str, str]:
        return {**self.dockerfile.environment(self.stage), **self.environment}

    def sandbox(self) -> list[str]:
        """The command that puts what follows it into this image."""
        environment = self.all_environment
        workdir = self.dockerfile.last(self.stage, "WORKDIR")
        sandbox = [*self.as_user, "bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent"]
        sandbox += ["--ro-bind", str(self.root.resolve()), "/", "--proc", "/proc", "--dev", "/dev"]
        sandbox += ["--tmpfs", "/tmp", "--tmpfs", environment["HOME"], "--chdir", workdir.text if workdir else "/"]
        sandbox.append("--clearenv")
        for key, value in environment.items():
            sandbox += ["--setenv", key, value]
        return sandbox

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """A command in a container of its own; with none, what the image starts by default."""
        words = [*self.sandbox(), *(command or (*self.words("ENTRYPOINT"), *self.words("CMD")))]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[Container]:
        """The image's entry point with these arguments in place of CMD; killed on leaving if it has not ended."""
        told, tell = os.pipe()
        with tempfile.NamedTemporaryFile() as log:
            command = [*self.sandbox(), "--info-fd", str(tell), *self.words("ENTRYPOINT"), *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=(tell,))
            os.close(tell)
            with os.fdopen(told) as reader:
                text = reader.read()
            if not text:
                process.wait()
                raise RuntimeError(f"the container did not start: {Path(log.name).read_text()}")
            try:
                yield Container(self, process, json.loads(text)["child-pid"], Path(log.name))
            finally:
                process.kill()
                process.wait()


@dataclass(frozen=True, slots=True)
class Container:
    image: Image
    process: subprocess.Popen[bytes]
    init: int
    """Its process 1, by the number it has on this machine."""
    log: Path

    def execute(self, command: Sequence[str], *, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """Another command inside, as `docker exec` runs it."""
        enter = ["nsenter", f"--target={self.init}", "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd"]
        enter += ["--", *self.image.as_user, "env", "-i"]
        enter += [f"{key}={value}" for key, value in self.image.all_environment.items()]
        return subprocess.run([*enter, *command], capture_output=True, text=True, timeout=timeout_s)

    def wait_for(self, command: Sequence[str], timeout_s: float) -> float:
        """Seconds until a command inside succeeds. Raises TimeoutError, or RuntimeError when it has ended."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with {self.process.returncode}: {self.output()}")
            if self.execute(command).returncode == 0:
                return time.monotonic() - began
            time.sleep(0.5)
        raise TimeoutError(f"{command[0]} did not succeed in {timeout_s:g} s: {self.output()[-2000:]}")

    def stop(self, timeout_s: float) -> int:
        """SIGTERM to process 1, as an engine stops it; the exit status."""
        os.kill(self.init, signal.SIGTERM)
        return self.process.wait(timeout_s)

    def output(self) -> str:
        return self.log.read_text()
