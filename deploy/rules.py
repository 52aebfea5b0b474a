"""What an image and a compose file of ours must hold to, as functions that name what is wrong; `python -m deploy.rules`
applies them to the files that ship.

They read the files, no more: whether an engine builds and starts them is not known here (deploy/README.md).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from deploy.dockerfile import Dockerfile, DockerfileError, parse

FOLDER = Path(__file__).resolve().parent
PINNED = re.compile(r"[\w./-]+(:[\w.-]+)?@sha256:[0-9a-f]{64}")
BUILD_ONLY = re.compile(
    r"\b(gcc|g\+\+|clang|make|cmake|build-essential|binutils|libc6-dev|python3-(dev|venv|pip)|git|curl)\b"
)
LABELS = ("title", "description", "licenses", "version", "revision", "base.name", "base.digest")


def dockerfile_problems(text: str, targets: tuple[str, ...] = ("cpu", "cuda")) -> list[str]:
    """Each as `stage: what is wrong; what to do`."""
    try:
        dockerfile = parse(text)
        found = [problem for name in dockerfile.stages for problem in _of_stage(dockerfile, name)]
        return found + [problem for name in targets for problem in _of_target(dockerfile, name)]
    except DockerfileError as error:
        return [str(error)]


def compose_problems(data: dict[str, Any], folder: Path = FOLDER) -> list[str]:
    """Each as `service: what is wrong; what to do`. Paths are relative to `folder`."""
    return [
        problem for name, service in data["services"].items() for problem in _of_service(name, service, data, folder)
    ]


def _of_stage(dockerfile: Dockerfile, name: str) -> list[str]:
    stage, found = dockerfile.stages[name], []
    if stage.base not in dockerfile.stages and not PINNED.fullmatch(stage.base) and stage.base != "scratch":
        found.append(f"{name}: the base {stage.base!r} is not pinned; name it with its @sha256 digest")
    for run in (instruction.text for instruction in stage.all("RUN")):
        for command in re.findall(r"pip install [^&|;]+", run):
            if "--no-index" not in command and not ("--require-hashes" in command and "--only-binary :all:" in command):
                found.append(
                    f"{name}: {command[:40]!r} takes what it is given; add --require-hashes --only-binary :all:"
                )
            if "--extra-index-url" in command or command.count("--index-url") > 1:
                found.append(
                    f"{name}: two indexes in one pip install let one answer for the other; install from each apart"
                )
        for packages in re.findall(r"apt-get install [^&|;]+", run):
            loose = [word for word in packages.split()[2:] if not word.startswith("-") and "=" not in word]
            if loose:
                found.append(f"{name}: {', '.join(loose)} without a version; write name=version")
        if re.search(r"(curl|wget)[^&;]*\|\s*(ba|da)?sh\b", run):
            found.append(f"{name}: runs what it downloads; pin it by a hash")
    return found


def _of_target(dockerfile: Dockerfile, name: str) -> list[str]:
    if name not in dockerfile.stages:
        return [f"{name}: there is no such stage; write FROM ... AS {name}"]
    found, lineage = [], dockerfile.lineage(name)
    user = dockerfile.last(name, "USER")
    if user is None or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text):
        found.append(f"{name}: USER is {user.text if user else 'root'!r}; give a numeric uid:gid that is not 0")
    for stage in lineage:
        for run in stage.all("RUN"):
            if match := BUILD_ONLY.search(run.text):
                found.append(
                    f"{name}: {match[0]!r} is used in stage {stage.name}, which ships; move it to a build stage"
                )
        if any("from" not in copy.flags for copy in stage.all("COPY")):
            found.append(f"{name}: stage {stage.name} copies from the context; copy from a build stage")
    entry, check = dockerfile.last(name, "ENTRYPOINT"), dockerfile.last(name, "HEALTHCHECK")
    if entry is None or entry.words()[0] != "tini":
        found.append(f"{name}: process 1 is not an init; begin ENTRYPOINT with tini")
    if command := dockerfile.last(name, "CMD"):
        command.words()  # refuses the shell form
    if check is None or not check.text.startswith("CMD ["):
        found.append(f"{name}: has no HEALTHCHECK in exec form; add one that asks /livez")
    labels = {key for stage in lineage for label in stage.all("LABEL") for key in label.pairs()}
    missing = [label for label in LABELS if f"org.opencontainers.image.{label}" not in labels]
    if missing:
        found.append(f"{name}: the OCI labels {', '.join(missing)} are missing")
    return found


def _of_service(name: str, service: dict[str, Any], data: dict[str, Any], folder: Path) -> list[str]:
    found: list[str] = []
    image = service.get("image", "")
    if "build" not in service and not PINNED.fullmatch(image):
        found.append(f"{name}: the image {image!r} is not pinned; name it with its @sha256 digest")
    if "build" in service and "${COMMIT" not in image:
        found.append(
            f"{name}: the image {image!r} does not name the commit it is built from; end its tag with ${{COMMIT}}"
        )
    if not service.get("profiles"):
        found.append(f"{name}: starts in every profile; name its profiles")
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
        found.append(f"{name}: is not read_only without capabilities; add both")
    if "no-new-privileges:true" not in service.get("security_opt", []):
        found.append(f"{name}: may gain privileges; add security_opt no-new-privileges:true")
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            found.append(f"{name}: publishes {port} on all interfaces; write 127.0.0.1:{port}")
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            if not (folder / source).exists():
                found.append(f"{name}: mounts {source}, which does not exist")
            if not volume.endswith(":ro"):
                found.append(f"{name}: may write to {source} of this repository; end it with :ro")
        elif not source.startswith("$") and source not in data.get("volumes", {}):
            found.append(f"{name}: the volume {source!r} is not declared; add it to volumes")
    for secret in service.get("secrets", []):
        if "file" not in data.get("secrets", {}).get(secret, {}):
            found.append(f"{name}: the secret {secret!r} has no file, and a read-only container takes no other kind")
    for variable, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|API_KEY|TOKEN|SECRET", variable) and not variable.endswith("_FILE"):
            found.append(f"{name}: {variable}={value!r} is seen by everyone who may inspect; give it as a secret")
    return found


def main() -> None:
    problems = dockerfile_problems((FOLDER / "Dockerfile").read_text(encoding="utf-8"))
    problems += compose_problems(yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8")))
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
