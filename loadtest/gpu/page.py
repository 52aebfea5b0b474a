"""The results page and the README's table, from a folder of measured parts, and the table by which attention backends
are chosen (`models/attention/measured.py`). None is ever written by hand.

What they are made from is kept beside the page as one file, so that anybody can make them again. Where nothing has been
measured both say so.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from loadtest.gpu.attention import choices
from loadtest.gpu.bench import Outcome
from loadtest.gpu.tables import TABLES, markdown, tables_of
from loadtest.gpu.targets import judge
from models.attention import measured

_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / "loadtest" / "results"
COMMAND = "python -m loadtest.gpu all --out DIR"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
_ORDER = ("limits", "correct", "text", "peer", "cold", "overlap", "kernels", "images", "quantized")
_TITLES = {
    "limits": "The card",
    "correct": "Correctness",
    "text": "Llama-3.1-8B's shape",
    "peer": "The mixed trace through transformers' continuous batching",
    "cold": "Cold start",
    "overlap": "Does the host hold the device up?",
    "kernels": "Kernels",
    "images": "Diffusion transformers",
    "quantized": "Quantised",
}


class NothingToShow(ValueError):
    """The folder is not one that a page can be made of; the message says why."""


def write_page(folder: Path | None, *, results: Path = RESULTS, readme: Path = _ROOT / "README.md") -> None:
    """Page, data and table; `folder` None: from the data that is there. Raises NothingToShow for a rehearsal."""
    data = results / "gpu.json"
    if folder is not None:
        outcomes = read_measured(folder)
        values = [dataclasses.asdict(outcome) for outcome in outcomes]
        data.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        measured.write([row for outcome in outcomes for row in choices(outcome)])
    kept = read_kept(data)
    (results / "gpu.md").write_text(page(kept), encoding="utf-8")
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), kept), encoding="utf-8")


def read_measured(folder: Path) -> list[Outcome]:
    """The parts of a run of `all`. Raises NothingToShow."""
    outcomes = []
    for part in _ORDER:
        path = folder / f"{part}.json"
        if path.is_file():
            outcomes.append(Outcome(**json.loads(path.read_text(encoding="utf-8"))))
    if not outcomes:
        raise NothingToShow(f"{folder} holds no measured part; give the folder of `{COMMAND}`")
    if any(outcome.is_rehearsal for outcome in outcomes):
        raise NothingToShow(f"{folder} holds a rehearsal, whose figures mean nothing; measure on a CUDA device")
    return outcomes


def read_kept(data: Path) -> list[Outcome]:
    """What the page beside it shows; none where nothing has been measured yet."""
    if not data.is_file():
        return []
    return [Outcome(**values) for values in json.loads(data.read_text(encoding="utf-8"))]


def page(outcomes: list[Outcome]) -> str:
    if not outcomes:
        return (
            "# On a GPU\n\n"
            "Nothing has been measured on a GPU yet, and none of the code for CUDA has run on one. On a machine with\n"
            f"a CUDA device, torch, triton and transformers `{COMMAND}` measures within nine\n"
            "minutes, and `python -m loadtest.gpu page DIR` makes this page and the README's table of it.\n\n"
            "What is aimed at on one H200:\n\n" + _targets(outcomes)
        )
    about = _about(outcomes)
    versions = ", ".join(f"{name} {value}" for name, value in about.get("versions", {}).items())
    parts = [
        "# On a GPU\n",
        f"{about.get('device')} ({about.get('memory_gb')} GB), {about.get('date')}, commit {about.get('commit')};",
        f"{versions}. Random weights, made on the device. Command: `{about.get('command')}`.\n",
        "The floor of a step is the larger of its bytes over the measured bandwidth (every weight but the input",
        "embedding, and the keys and values of all positions before) and its operations over the measured matrix",
        "rate. MFU is of the datasheet's 989 TFLOP/s. Made by `python -m loadtest.gpu page`; data: `gpu.json`.\n",
        "## Targets on one H200\n",
        _targets(outcomes),
    ]
    for outcome in outcomes:
        parts.append(f"## {_TITLES[outcome.part]}\n")
        parts += [table + "\n" for table in tables_of(outcome)]
        parts += [f"Left out: {what}.\n" for what in outcome.skipped]
        if outcome.state != "done":
            parts.append(f"This part was not completed ({outcome.state}): {outcome.error}\n")
    return "\n".join(parts)


def with_table(readme: str, outcomes: list[Outcome]) -> str:
    """`readme` with what stands between the two marks made new. Raises NothingToShow where a mark is missing."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    if not pattern.search(readme):
        raise NothingToShow(f"the README lacks the marks {BEGIN} and {END}; put them where the table is to stand")
    return pattern.sub(lambda _: f"{BEGIN}\n{table(outcomes)}\n{END}", readme)


def table(outcomes: list[Outcome]) -> str:
    """For the README: decodes and how the targets stand."""
    if not outcomes:
        return (
            f"Nothing has been measured on a GPU yet. `{COMMAND}` does it within nine minutes on a\n"
            "machine with a CUDA device; `python -m loadtest.gpu page DIR` then puts a table here and\n"
            "makes `loadtest/results/gpu.md`."
        )
    about = _about(outcomes)
    decodes = [row for outcome in outcomes for row in outcome.of_kind("decode")]
    verdicts = [target.verdict for target in judge(outcomes)]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    lead = (
        f"Llama-3.1-8B's shape on one {about.get('device')}, {about.get('date')}, commit {about.get('commit')} "
        f"(`loadtest/results/gpu.md`; targets: {counts}):"
    )
    return lead + ("\n\n" + markdown(TABLES["decode"], decodes) if decodes else " no decode was measured.")


def _about(outcomes: list[Outcome]) -> dict[str, Any]:
    """Of the first part that came so far as to tell."""
    return next((outcome.about for outcome in outcomes if "device" in outcome.about), {})


def _targets(outcomes: list[Outcome]) -> str:
    lines = ["| target | |", "|---|---|"]
    lines += [f"| {target.sentence} | {target.verdict} |" for target in judge(outcomes)]
    return "\n".join(lines) + "\n"
