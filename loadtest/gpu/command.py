"""Checks and measures a GPU: `python -m loadtest.gpu all --out DIR`, within nine minutes on a machine with torch,
triton, transformers, safetensors and numpy. Weights are made on the device; image models need diffusers and are left
out, with a sentence, where it is absent.

    limits    what the card can do: copy bandwidth, bfloat16 matrix rate
    correct   tokens and pictures are those of the CPU, in any batch
    text      Llama-3.1-8B's shape: decode, prefill, a mixed trace, speculation, prefix cache
    peer      the same mixed trace through transformers' own continuous batching
    cold      process start to first token, in fresh processes
    overlap   what a decode step copies and waits for
    kernels   error of each kernel against float64, and its share of the ceiling
    images    DiT-XL/2 at two sizes and FLUX.1-dev's shape: step time against rows
    quantized decodes with weights in fp8, int4 and int8, and with a KV cache in fp8
    all       each of them in a process of its own: what fails or overruns does not stop the others
    page      the results page and the README's table, from such a folder; without one they say that nothing is measured

Each part leaves DIR/PART.json. Exit status: 0 when all parts ran to their end and found nothing wrong, 1 when not, 2
without a CUDA device. `--rehearse` runs all that code on the CPU with tiny shapes; nothing of it is a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from loadtest.gpu.bench import Bench, Outcome, WrongResult, path_of, read_outcome
from loadtest.gpu.machine import About
from loadtest.gpu.page import write_page
from loadtest.gpu.tables import told
from loadtest.gpu.targets import judge

PARTS = {
    "limits": 15.0,
    "correct": 45.0,
    "text": 140.0,
    "peer": 75.0,
    "cold": 85.0,
    "overlap": 20.0,
    "kernels": 85.0,
    "images": 65.0,
    "quantized": 80.0,
}
"""In the order of `all`, with the seconds of each; the last has those that others left."""
_MARGIN_S = 10.0
"""Of a part's seconds: to start its process, and to end what it is at when they are over."""
_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    if args.part == "page":
        write_page(args.folder)
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} finds none, so there is nothing to check or to measure here")
        return 2
    command = shlex.join(["python", "-m", "loadtest.gpu", *arguments])
    if args.part == "all":
        return run_all(args.out, args.parts.split(","), 60 * args.minutes, command, args.commit, args.rehearse)
    about = About.here(args.command or command, is_rehearsal=args.rehearse, commit=args.commit)
    bench = Bench(args.part, args.out, about, budget_s=PARTS[args.part] if args.budget is None else args.budget)
    return run_part(bench)


def run_part(bench: Bench) -> int:
    """Here and now. Exit status as of the module."""
    bench.keep()
    run: Callable[[Bench], None] = importlib.import_module(f"loadtest.gpu.{bench.outcome.part}").run
    try:
        run(bench)
    except WrongResult as error:
        bench.keep("wrong", str(error))
    except Exception as error:
        traceback.print_exc()
        bench.keep("failed", f"{type(error).__name__}: {error}"[:500])
    else:
        bench.keep("failed" if bench.failures else "done", "; ".join(bench.failures) or None)
    print(told(bench.outcome), flush=True)
    return int(bench.outcome.state != "done")


def run_all(out: Path, parts: list[str], total_s: float, command: str, commit: str | None, rehearse: bool) -> int:
    """Each part in a process of its own, killed when its seconds are over."""
    began = time.monotonic()
    for part in parts:
        path_of(out, part).unlink(missing_ok=True)
        left = total_s - (time.monotonic() - began)
        seconds = left if rehearse else min(PARTS[part], left)
        if seconds < _MARGIN_S:
            nothing = Outcome(part, {"is_rehearsal": rehearse}, 0.0, "cut", error="no seconds were left for it")
            nothing.write(out)
            continue
        arguments = [part, "--out", str(out), "--budget", str(max(0.0, seconds - _MARGIN_S)), "--command", command]
        arguments += ["--commit", commit] if commit else []
        print(f"\n== {part}, {seconds:.0f} s", flush=True)
        _run_process([*arguments, *["--rehearse"] * rehearse], out, part, seconds)
    outcomes = [outcome for part in parts if (outcome := read_outcome(out, part)) is not None]
    print("\n".join(told(outcome) for outcome in outcomes))
    if not rehearse:
        print("\n== targets\n" + "\n".join(f"{target.verdict:12} {target.sentence}" for target in judge(outcomes)))
    took = time.monotonic() - began
    print(f"\n== {took:.0f} s: " + ", ".join(f"{outcome.part} {outcome.state}" for outcome in outcomes))
    return int(len(outcomes) < len(parts) or any(outcome.state != "done" for outcome in outcomes))


def _run_process(arguments: list[str], out: Path, part: str, seconds: float) -> None:
    """What it does not write about its end itself, because it was killed or died, is written here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    if "--rehearse" in arguments:
        environment["TRITON_INTERPRET"] = "1" if part == "kernels" else "0"
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.gpu", *arguments], env=environment, start_new_session=True
    )
    try:
        status = process.wait(max(seconds, 1.0))
        state, error = "failed", f"its process ended with status {status}"
    except subprocess.TimeoutExpired:
        state, error = "cut", f"it was not done within {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # those that it started, too: they would hold the device's memory
        process.wait()
    outcome = read_outcome(out, part)
    if outcome is None:  # it never came so far
        outcome = Outcome(part, {"is_rehearsal": "--rehearse" in arguments}, seconds)
    if outcome.state == "running":
        outcome.state, outcome.error = state, error
        outcome.write(out)


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gpu",
        description="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name in ("all", *PARTS):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSON files go")
        command.add_argument(
            "--rehearse", action="store_true", help="on the CPU, tiny: runs the code, measures nothing"
        )
        command.add_argument("--commit", help="of this source, where git cannot be asked")
        if name == "all":
            command.add_argument("--minutes", type=float, default=9.0, help="for everything")
            command.add_argument("--parts", default=",".join(PARTS), help="which, in which order")
        else:
            command.add_argument("--budget", type=float, metavar="SECONDS", help=f"default {PARTS[name]:g}")
            command.add_argument("--command", help=argparse.SUPPRESS)
    page = commands.add_parser("page")
    page.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="of `all --out DIR`")
    return parser
