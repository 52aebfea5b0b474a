"""Does this client measure what another one measures? Both against one server, in turns.

    python -m loadtest.agreement --base-url URL --tokenizer FOLDER [--runs 5] [-o pairs.jsonl]

Each turn is one run of `tandem loadtest` and one of `vllm bench serve`, in alternating order, as processes of their
own: the same endpoint, lengths, rate and number of requests, streamed completions, end token ignored. The rate is half
of what a closed loop of `--saturation-concurrency` requests gets through, unless given. Told are the medians over all
turns and their ratio. With `-o` turns are added to a file, and the medians are of all that it holds.

The clients differ in what they call a token: vLLM's counts every chunk with a choice, the last one that only has the
finish reason too, so one of its gaps a request is near 0. Ours counts chunks with content, from the scheduled time. On
a server with speculation prompts decide how fast it is, and the two draw other prompts: turn it off.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMPARED = ("median_ttft_ms", "mean_ttft_ms", "median_itl_ms", "mean_itl_ms", "median_tpot_ms", "output_throughput")
JUDGED = ("median_ttft_ms", "median_itl_ms", "output_throughput")
LIMIT = 0.05


def main(arguments: list[str] | None = None) -> None:
    """Exit status 1 when a median differs by more than `LIMIT`."""
    args = _parser().parse_args(arguments)
    file = Path(args.out) if args.out else None
    turns = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    rate = args.request_rate or (turns[0]["rate"] if turns else saturation(args) / 2)
    for _ in range(args.runs):
        turns.append(turn(args, rate, number=len(turns)))
        if file:
            file.write_text("".join(json.dumps(one) + "\n" for one in turns))
    table = agreement(turns)
    print(f"{len(turns)} turns at {rate:.3g} requests/s; medians (lowest to highest)")
    for name, row in table.items():
        print(
            f"{name:<20}  ours {row['ours']:>9.3f}  vLLM {row['vllm']:>9.3f}  ratio {row['ratio']:.3f}  {row['spread']}"
        )
    raise SystemExit(any(abs(table[name]["ratio"] - 1) > LIMIT for name in JUDGED))


def saturation(args: argparse.Namespace) -> float:
    """Requests a second of a closed loop."""
    flags = ["--max-concurrency", str(args.saturation_concurrency), "--seed", "1000"]
    return float(_ours(args, flags)["request_throughput"])


def turn(args: argparse.Namespace, rate: float, *, number: int) -> dict[str, Any]:
    """One run of each; the first to go changes from turn to turn."""
    flags = ["--request-rate", str(rate), "--burstiness", str(args.burstiness)]
    found: dict[str, Any] = {"rate": rate}
    for client in ("ours", "vllm") if number % 2 == 0 else ("vllm", "ours"):
        seed = ["--seed", str(2 * number + (client == "vllm"))]
        told = _ours(args, [*flags, *seed]) if client == "ours" else _vllm(args, [*flags, *seed])
        found[client] = {name: told[name] for name in (*COMPARED, "completed", "failed", "duration")}
        if "client" in told:
            found["client"] = told["client"]
    return found


def agreement(turns: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians of both over all turns, their ratio, and the ranges."""
    table = {}
    for name in COMPARED:
        ours, theirs = ([one[client][name] for one in turns] for client in ("ours", "vllm"))
        median, other = statistics.median(ours), statistics.median(theirs)
        spread = f"({min(ours):.3f} to {max(ours):.3f}; {min(theirs):.3f} to {max(theirs):.3f})"
        table[name] = {"ours": median, "vllm": other, "ratio": median / other, "spread": spread}
    return table


def _ours(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", "from serve.cli import main; main()", "loadtest", "run", "--no-progress"]
    return _told([*command, "--tokenizer", args.tokenizer, *_common(args), *flags])


def _vllm(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    given = ["--disable-tqdm", "--save-result", "--dataset-name", "random", "--tokenizer", args.tokenizer]
    return _told([*shlex.split(args.vllm), *given, *_common(args), "--endpoint", "/v1/completions", *flags])


def _common(args: argparse.Namespace) -> list[str]:
    """Flags that both clients understand."""
    lengths = ["--random-input-len", str(args.input_len), "--random-output-len", str(args.output_len)]
    asked = ["--backend", "openai", "--base-url", args.base_url, "--model", args.model, "--ignore-eos"]
    return [*asked, *lengths, "--num-prompts", str(args.num_prompts), "--num-warmups", "4"]


def _told(command: list[str]) -> dict[str, Any]:
    """The result file of a client. Raises RuntimeError with its last words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--result-dir", folder, "--result-filename", "told.json"], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
        told: dict[str, Any] = json.loads((Path(folder) / "told.json").read_text())
        return told


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.agreement", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="tandem-text")
    parser.add_argument("--tokenizer", required=True, help="folder of the model's tokenizer")
    parser.add_argument("--vllm", default="vllm bench serve", help="the command, or another that takes its flags")
    parser.add_argument("--runs", type=int, default=5, help="turns")
    parser.add_argument("--request-rate", type=float, help="default: half of saturation")
    parser.add_argument("--burstiness", type=float, default=1.0)
    parser.add_argument("--saturation-concurrency", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("-o", "--out", help="add the turns to this file")
    return parser


if __name__ == "__main__":
    main()
