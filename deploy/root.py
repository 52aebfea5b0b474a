"""Builds a stage's file system from the Dockerfile without a container engine: each RUN in a sandbox (bubblewrap) whose
root is the stage so far, each COPY by hand.

The base image cannot be pulled without an engine or a registry, so a fresh Debian of the same release stands in for it:
`mmdebstrap --variant=minbase`, signed packages from Debian's archive. Needs root, for what packages do to their files.
Finished stages are kept and used again while nothing they are made of has changed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.dockerfile import META, Dockerfile, DockerfileError, Instruction, Stage, context_files, expand, ignored

ARCHIVE = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
FIRST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds stages of one Dockerfile under `work`, a folder each."""

    dockerfile: Dockerfile
    context: Path
    work: Path
    arguments: Mapping[str, str] = field(default_factory=dict)
    """As `--build-arg` gives them."""
    mounts: Sequence[tuple[Path, str]] = ()
    """Files and folders of this machine that RUN sees, read-only: a wheel's folder, certificates."""
    extra_environment: Mapping[str, str] = field(default_factory=dict)
    """That RUN sees on top, and the image does not: where this machine's certificates are."""

    def build(self, name: str) -> Path:
        """The root of a stage, built with every stage it needs."""
        root, mark = self.work / name, self.work / f"{name}.made-of"
        made_of = self._made_of(name)
        if mark.exists() and mark.read_text() == made_of:
            return root
        mark.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        stage = self.dockerfile.stages[name]
        print(f"stage {name}: from {stage.base}", flush=True)
        if stage.base in self.dockerfile.stages:
            self._call("cp", "-a", "--reflink=auto", str(self.build(stage.base)), str(root))
        else:
            self._debian(stage.base, root)
        self._run_all(stage, root)
        mark.write_text(made_of)
        return root

    def _run_all(self, stage: Stage, root: Path) -> None:
        folder = "/"
        values = {"PATH": FIRST_PATH, **self._inherited(stage)}
        for position, instruction in enumerate(stage.instructions):
            match instruction.name:
                case "ARG":
                    for key, default in instruction.pairs().items():
                        default = default or self.dockerfile.arguments.get(key, "")
                        values[key] = self.arguments.get(key, default)
                case "ENV":
                    values |= {key: expand(value, values) for key, value in instruction.pairs().items()}
                case "WORKDIR":
                    folder = instruction.text
                    (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(instruction, root, folder)
                case "RUN":
                    self._run(instruction.text, root, folder, values)
                case "USER":
                    if any(item.name == "RUN" for item in stage.instructions[position:]):
                        raise DockerfileError("RUN after USER: this builder runs as root only")
                case name if name not in META:
                    raise DockerfileError(f"{name} is not something this builder can do")

    def _inherited(self, stage: Stage) -> dict[str, str]:
        return self.dockerfile.environment(stage.base) if stage.base in self.dockerfile.stages else {}

    def _run(self, line: str, root: Path, folder: str, values: Mapping[str, str]) -> None:
        print(f"  RUN {line[:100]}", flush=True)
        sandbox = ["bwrap", "--bind", str(root), "/", "--proc", "/proc", "--dev", "/dev", "--cap-add", "ALL"]
        sandbox += ["--ro-bind", "/etc/resolv.conf", "/etc/resolv.conf", "--chdir", folder, "--clearenv"]
        for source, target in self.mounts:
            sandbox += ["--ro-bind", str(source.resolve()), target]
        for key, value in {**values, "HOME": "/root", **self.extra_environment}.items():
            sandbox += ["--setenv", key, value]
        self._call(*sandbox, "/bin/sh", "-c", line)

    def _copy(self, instruction: Instruction, root: Path, folder: str) -> None:
        *sources, target = instruction.words()
        into = root / (Path(folder) / target).as_posix().lstrip("/")
        if "from" in instruction.flags:
            [source] = sources
            into.mkdir(parents=True, exist_ok=True)
            self._call("cp", "-a", f"{self.build(instruction.flags['from'])}{source}/.", str(into))
            return
        is_ignored = ignored((self.context / ".dockerignore").read_text())
        for source in sources:
            for path in context_files(self.context, source, is_ignored):
                whole = (self.context / source).is_dir()
                inner = path.relative_to(source) if whole else Path(path.name)
                at = into / inner if whole or target.endswith("/") else into
                at.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / path, at)

    def _debian(self, image: str, root: Path) -> None:
        """A minimal Debian of the image's release, with its updates."""
        release = image.partition(":")[2].partition("-")[0]
        lines = [f"deb {ARCHIVE} {release} main", f"deb {ARCHIVE} {release}-updates main"]
        lines.append(f"deb {SECURITY} {release}-security main")
        self._call("mmdebstrap", "--quiet", "--variant=minbase", release, str(root), *lines)

    def _made_of(self, name: str) -> str:
        """A digest over all that a stage is made of."""
        stage = self.dockerfile.stages[name]
        parts: list[str] = [self._made_of(stage.base) if stage.base in self.dockerfile.stages else stage.base]
        declared = {key for item in stage.all("ARG") for key in item.pairs()}
        parts += [f"{key}={self.arguments[key]}" for key in sorted(declared & self.arguments.keys())]
        is_ignored = ignored((self.context / ".dockerignore").read_text())
        for instruction in stage.instructions:
            if instruction.name in META:
                continue
            parts.append(f"{instruction.name} {instruction.flags} {instruction.text}")
            if instruction.name == "COPY" and "from" in instruction.flags:
                parts.append(self._made_of(instruction.flags["from"]))
            elif instruction.name == "COPY":
                for source in instruction.words()[:-1]:
                    for path in context_files(self.context, source, is_ignored):
                        parts.append(f"{path} {hashlib.sha256((self.context / path).read_bytes()).hexdigest()}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @staticmethod
    def _call(*command: str) -> None:
        subprocess.run(command, check=True)
