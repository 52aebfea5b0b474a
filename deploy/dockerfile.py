"""Reads a Dockerfile into its stages, and a `.dockerignore` into a rule: what the checks and the drill stand on.

Only what our own file uses is understood, by the Dockerfile reference; anything else is refused by name, for a reader
that guesses would prove nothing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

META = frozenset(["CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "USER"])
"""Instructions that change no file."""
KNOWN = META | {"ARG", "COPY", "ENV", "FROM", "RUN", "WORKDIR"}
_VARIABLE = re.compile(r"(?<!\\)\$(?:\{(\w+)\}|(\w+))")


class DockerfileError(ValueError):
    """The file holds what this reader does not understand."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its flags (`--from=build`) apart from the rest, which is as it was written."""

    name: str
    flags: Mapping[str, str]
    text: str

    def words(self) -> list[str]:
        """Of the exec form (a JSON list) or of plain words. A command in shell form is refused: use `text`."""
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        if self.name in ("CMD", "ENTRYPOINT"):
            raise DockerfileError(f"{self.name} is in shell form, so signals reach a shell; write it as a JSON list")
        return shlex.split(self.text)

    def pairs(self) -> dict[str, str]:
        """Of ENV and LABEL, and of ARG (whose value may be missing and is then empty)."""
        return dict(word.partition("=")[::2] for word in shlex.split(self.text))


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    base: str
    """An image, or the name of an earlier stage."""
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    arguments: dict[str, str]
    """ARGs before the first FROM: the defaults of those that stages declare."""
    stages: dict[str, Stage]

    def lineage(self, name: str) -> list[Stage]:
        """The stages that `name` stands on, the first one first, and itself."""
        chain = [self.stages[name]]
        while chain[0].base in self.stages:
            chain.insert(0, self.stages[chain[0].base])
        return chain

    def last(self, name: str, instruction: str) -> Instruction | None:
        """The instruction of that name that counts in a stage: the last one of its lineage."""
        found = [item for stage in self.lineage(name) for item in stage.all(instruction)]
        return found[-1] if found else None

    def environment(self, name: str) -> dict[str, str]:
        """ENV of a stage's containers."""
        merged: dict[str, str] = {}
        for stage in self.lineage(name):
            for instruction in stage.all("ENV"):
                merged |= {key: expand(value, merged) for key, value in instruction.pairs().items()}
        return merged


def parse(text: str) -> Dockerfile:
    """Raises DockerfileError."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            base, _, name = instruction.text.partition(" AS ")
            name = name or str(len(stages))
            stages[name] = Stage(name, base, ())
        elif not stages:
            if instruction.name != "ARG":
                raise DockerfileError(f"{instruction.name} stands before the first FROM")
            arguments |= instruction.pairs()
        else:
            *_, current = stages.values()
            stages[current.name] = Stage(current.name, current.base, (*current.instructions, instruction))
    return Dockerfile(arguments, stages)


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced; an unknown name is empty, as in a Dockerfile."""
    return _VARIABLE.sub(lambda match: values.get(match[1] or match[2], ""), text)


def ignored(rules: str) -> Callable[[str], bool]:
    """Whether a path of the build context (relative, `/` between parts) is left out by these `.dockerignore` rules: the
    last rule that matches it or a folder above it decides."""
    compiled: list[tuple[re.Pattern[str], bool]] = []
    for line in map(str.strip, rules.splitlines()):
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").strip("/")
            parts = re.split(r"(\*\*/|\*|\?)", pattern)
            expression = "".join(_GLOBS.get(part, re.escape(part)) for part in parts)
            compiled.append((re.compile(rf"{expression}(/.*)?"), not line.startswith("!")))

    def is_ignored(path: str) -> bool:
        verdict = False
        for pattern, leaves_out in compiled:
            if pattern.fullmatch(path):
                verdict = leaves_out
        return verdict

    return is_ignored


_GLOBS = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}


def context_files(root: Path, source: str, is_ignored: Callable[[str], bool]) -> Iterator[Path]:
    """The files that `COPY source` takes from the context, relative to `root`, in order."""
    start = root / source
    found = sorted(path for path in start.rglob("*") if path.is_file()) if start.is_dir() else [start]
    for path in found:
        relative = path.relative_to(root)
        if not is_ignored(relative.as_posix()):
            yield relative


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name not in KNOWN:
            raise DockerfileError(f"{name} is not among the instructions known here: {', '.join(sorted(KNOWN))}")
        flags: dict[str, str] = {}
        while match := re.match(r"--([\w-]+)=(\S+)\s+", rest) if name in ("COPY", "HEALTHCHECK", "RUN") else None:
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        yield Instruction(name, flags, rest)
