"""Builds an image's file system without a container engine and proves that it runs and needs nothing it lacks.

    python -m deploy.final_stage cpu --work /var/tmp/tandem-image

Every line is the Dockerfile's own, so the two cannot drift: `root.py` executes RUN and COPY, `container.py` runs what
USER, ENV, ENTRYPOINT, CMD and HEALTHCHECK say, on a read-only root, without capabilities and without a network. Needs
root, Debian's `mmdebstrap` and `bubblewrap`, and a package index. Ends with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.container import Container, Image
from deploy.dockerfile import parse
from deploy.root import Builder

ROOT = Path(__file__).resolve().parent.parent
KEY = "drill-key"
START_S, STOP_S = 600.0, 180.0
TOOLS = "gcc g++ cc c++ cpp clang tcc as ld make cmake pip pip3 git curl wget".split()  # noqa: SIM905
OPTIONAL = ("libtbb.so.12", "libgomp.so.1.0.0")
"""Of thread pools that numba tries and does without."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx")
ASK = """
import json, sys, urllib.request
path, body = sys.argv[1], sys.argv[2]
request = urllib.request.Request("http://127.0.0.1:8000" + path, body.encode() or None)
request.add_header("Authorization", "Bearer KEY")
request.add_header("Content-Type", "application/json")
print(urllib.request.urlopen(request, timeout=120).read().decode())
""".replace("KEY", KEY)
LIBRARIES = """
import pathlib, subprocess
for path in pathlib.Path("/opt/tandem").rglob("*.so*"):
    told = subprocess.run(["ldd", str(path)], capture_output=True, text=True).stdout
    for line in told.splitlines():
        if "not found" in line:
            print(line.split()[0], path)
"""

Check = tuple[str, Callable[[], str]]
"""What is claimed, and what finds out: it returns what was seen, or raises AssertionError."""


def main() -> None:
    arguments = _parser().parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    dockerfile = parse((ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8"))
    mounts = [(Path(source), target) for source, _, target in (text.partition(":") for text in arguments.mount)]
    trusted = {"PIP_CERT": "/certificates.pem"} if arguments.certificates else {}
    if arguments.certificates:
        mounts.append((arguments.certificates, "/certificates.pem"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    given = {"COMMIT": commit.strip(), **dict(text.partition("=")[::2] for text in arguments.build_arg)}
    root = Builder(dockerfile, ROOT, arguments.work, given, mounts, trusted).build(arguments.stage)
    failed = 0
    for claim, find_out in checks(Image(dockerfile, arguments.stage, root)):
        try:
            print(f"ok      {claim}: {find_out()}", flush=True)
        except (AssertionError, RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"FAILED  {claim}: {error}", flush=True)
    raise SystemExit(1 if failed else 0)


def checks(image: Image) -> Iterator[Check]:
    yield "no compiler, linker, package installer or fetcher of sources", lambda: no_tools(image)
    yield "no weights but the embedded models", lambda: only_embedded_weights(image)
    yield "its user can write nowhere in it", lambda: nothing_writable(image)
    yield "every shared library finds those it needs", lambda: libraries_are_found(image)
    yield "without a key it refuses to serve beyond loopback", lambda: refuses_without_key(image)
    with_key = Image(image.dockerfile, image.stage, image.root, {"TANDEM_API_KEY": KEY})
    default = image.words("CMD")
    yield "the default command serves, with Ray inside, and SIGTERM ends it", lambda: serves(with_key, *default)
    yield "so it does with --no-ray", lambda: serves(with_key, *default, "--no-ray")


def no_tools(image: Image) -> str:
    found = image.run("sh", "-c", f"for name in {' '.join(TOOLS)}; do command -v $name; done; true").stdout.split()
    assert not found, f"found {', '.join(found)}"
    size = subprocess.run(["du", "-sm", str(image.root)], capture_output=True, text=True).stdout.split()[0]
    return f"none of {len(TOOLS)} names; {size} MB in all"


def only_embedded_weights(image: Image) -> str:
    heavy = [path for path in image.root.rglob("*") if path.suffix in WEIGHTS and path.stat().st_size > 1 << 20]
    known = ("/site-packages/models/embedded/", "/var/cache/apt/")  # apt's are indexes, and not in the base's image
    heavy = [path for path in heavy if known[1] not in str(path)]
    strange = [path for path in heavy if known[0] not in str(path)]
    assert not strange, f"found {', '.join(map(str, strange))}"
    return f"{len(heavy)} files, {sum(path.stat().st_size for path in heavy) / 1e6:.0f} MB"


def nothing_writable(image: Image) -> str:
    """By permissions alone, the root not mounted read-only: an engine that is told no `--read-only` relies on them."""
    find = ["find", str(image.root), "-xdev", "(", "-type", "f", "-o", "-type", "d", ")", "-writable"]
    home = image.dockerfile.environment(image.stage)["HOME"]
    done = subprocess.run([*image.as_user, *find], capture_output=True, text=True)
    inside = ["/" + str(Path(line).relative_to(image.root)) for line in done.stdout.splitlines()]
    meant = (home, "/tmp", "/var/tmp", "/run/lock")
    strange = [path for path in inside if not any(path == top or path.startswith(f"{top}/") for top in meant)]
    assert not strange, f"{len(strange)} paths, {', '.join(strange[:5])}"
    return f"only {', '.join(meant)}"


def libraries_are_found(image: Image) -> str:
    lines = image.run("python3", "-c", LIBRARIES, timeout_s=600).stdout.splitlines()
    missing = {line.split()[0] for line in lines} - set(OPTIONAL)
    drivers = {name for name in missing if name.startswith(("libcuda.so", "libnvidia-ml.so"))}
    assert missing == drivers, "; ".join(sorted(lines)[:10])
    return f"but the host driver's {', '.join(sorted(drivers))}" if drivers else "none is missing"


def refuses_without_key(image: Image) -> str:
    done = image.run()
    assert done.returncode == 1, f"ended with {done.returncode}"
    said = (done.stdout + done.stderr).strip()
    assert "api_key" in said or "--api-key" in said, said
    return repr(said.splitlines()[-1])


def serves(image: Image, *arguments: str) -> str:
    with image.started(*arguments) as container:
        seconds = container.wait_for(image.words("HEALTHCHECK"), START_S)
        seconds += container.wait_for(["python3", "-c", ASK, "/readyz", ""], START_S)
        for model in ("tandem-text", "tandem-image"):  # readiness is of the first model that answers
            seconds += container.wait_for(["python3", "-c", ASK, f"/v1/models/{model}", ""], START_S)
        answers(container)
        users = container.execute(["sh", "-c", "cat /proc/[0-9]*/status | grep -h ^Uid | sort -u"]).stdout.split()
        assert set(users[1:]) == {str(image.user[0])}, f"processes of users {users}"
        first = container.execute(["cat", "/proc/1/comm"]).stdout.strip()
        assert first == "tini", f"process 1 is {first}"
        ports = container.execute(["python3", "-m", "loadtest.ports", "1"])
        assert ports.returncode == 0, ports.stdout + ports.stderr
        status = container.stop(STOP_S)
        assert status == 0, f"SIGTERM ended it with {status}: {container.output()[-2000:]}"
    seen = ports.stdout.strip().splitlines()[-1]
    return f"ready after {seconds:.0f} s, chat and image answered, all uid {image.user[0]} below tini, {seen}, end 0"


def answers(container: Container) -> None:
    question = [{"role": "user", "content": "What is 27 + 58?"}]
    body = json.dumps({"model": "tandem-text", "messages": question, "temperature": 0})
    said = json.loads(ask(container, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
    assert "85" in said, f"27 + 58 was answered with {said!r}"
    wish = json.dumps({"model": "tandem-image", "prompt": "a red circle on a white background", "seed": 7})
    picture = json.loads(ask(container, "/v1/images/generations", wish))["data"][0]["b64_json"]
    assert base64.b64decode(picture).startswith(b"\x89PNG"), "the image is no PNG"


def ask(container: Container, path: str, body: str) -> str:
    done = container.execute(["python3", "-c", ASK, path, body], timeout_s=180)
    assert done.returncode == 0, f"{path}: {done.stderr.strip().splitlines()[-1:]}; log: {container.output()[-2000:]}"
    return done.stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("cpu", "cuda"))
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where stages are built and kept")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="HERE:THERE", help="seen by RUN, such as a folder of wheels"
    )
    parser.add_argument("--certificates", type=Path, metavar="FILE", help="that pip trusts, behind a proxy of your own")
    return parser


if __name__ == "__main__":
    main()
