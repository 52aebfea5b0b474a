"""The results page and the README's table come from measured rows and from nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.gpu.bench import Outcome
from loadtest.gpu.page import BEGIN, END, NothingToShow, page, read_kept, table, with_table, write_page
from loadtest.gpu.tables import TABLES, tables_of
from loadtest.gpu.targets import judge
from models.attention import measured

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "loadtest" / "results"
ABOUT = {
    "date": "2030-01-02 03:04 UTC",
    "device": "NVIDIA H200",
    "memory_gb": 150.0,
    "versions": {"torch": "2.11.0"},
    "commit": "abc1234",
    "command": "python -m loadtest.gpu all --out out",
    "is_rehearsal": False,
}


def outcome(part: str, rows: list[dict[str, Any]], **values: Any) -> Outcome:
    return Outcome(part, {**ABOUT, **values.pop("about", {})}, 60.0, **{"state": "done", "rows": rows, **values})


def decode(batch: int, tok_s: float, roofline: float) -> dict[str, Any]:
    return {
        "kind": "decode", "batch": batch, "context": 1024, "tok_s": tok_s, "step_ms": 1e3 * batch / tok_s,
        "p90_ms": 5.0, "floor_ms": 3.0, "roofline": roofline, "steps": 40,
    }  # fmt: skip


def mixed(engine: str, tok_s: float) -> dict[str, Any]:
    return {"kind": "mixed", "engine": engine, "load": "all at once", "output_tok_s": tok_s}


MEASURED = [
    outcome("text", [decode(1, 250.0, 0.79), decode(64, 9000.0, 0.7), mixed("tandem", 9000.0)]),
    outcome("peer", [mixed("transformers 5", 2000.0)], state="cut", error="it was not done within 60 s"),
]


def attention(backend: str, error: float | None) -> dict[str, Any]:
    return {
        "kind": "attention", "phase": "decode", "shape": "8 x 1024", "kv": "auto", "backend": backend, "sequences": 8,
        "num_new": 1, "context": 1024, "error": error, "microseconds": 30.0, "ceiling": 0.8,
    }  # fmt: skip


KERNELS = outcome("kernels", [attention("triton", 1e-3), attention("sdpa", 1e-3), attention("varlen", 0.5)])


def verdicts(outcomes: list[Outcome]) -> dict[str, str]:
    return {target.sentence: target.verdict for target in judge(outcomes)}


def test_the_page_and_the_readme_are_what_the_command_writes(tmp_path):
    """Whoever has measured writes them with `python -m loadtest.gpu page DIR`; nobody writes them by hand."""
    kept = read_kept(RESULTS / "gpu.json")
    assert (RESULTS / "gpu.md").read_text(encoding="utf-8") == page(kept)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, kept) == readme


def test_without_results_they_say_so_and_name_no_figure_as_measured():
    assert "Nothing has been measured on a GPU yet" in page([]) and "Nothing has been measured" in table([])
    assert set(verdicts([]).values()) == {"not measured"}


def test_a_rehearsal_makes_no_page(tmp_path):
    outcome("limits", [], about={"is_rehearsal": True}).write(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(NothingToShow, match="rehearsal"):
        write_page(tmp_path, results=tmp_path, readme=readme)
    assert not (tmp_path / "gpu.md").exists() and readme.read_text() == f"{BEGIN}\n{END}\n"


def test_an_empty_folder_makes_no_page(tmp_path):
    with pytest.raises(NothingToShow, match="no measured part"):
        write_page(tmp_path / "nothing", results=tmp_path)


def test_a_folder_of_parts_makes_page_data_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "TABLE", tmp_path / "measured.json")
    for part in (*MEASURED, KERNELS):
        part.write(tmp_path / "out")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(tmp_path / "out", results=tmp_path, readme=readme)
    text, made = readme.read_text(), (tmp_path / "gpu.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 64 | 1,024 | 9,000 |" in text and "NVIDIA H200" in text and "commit abc1234" in text
    for told in ("torch 2.11.0", "python -m loadtest.gpu all --out out", "2030-01-02", "not completed (cut)"):
        assert told in made
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept == [dataclasses.asdict(part) for part in (*MEASURED, KERNELS)]
    (row,) = measured.read()  # neither the reference nor what was wrong is to choose from
    assert (row.backend, row.device, row.context, row.microseconds) == ("triton", "NVIDIA H200", 1024, 30.0)
    write_page(None, results=tmp_path, readme=readme)
    assert (tmp_path / "gpu.md").read_text() == made and readme.read_text() == text


def test_a_readme_without_its_marks_is_refused():
    with pytest.raises(NothingToShow, match="marks"):
        with_table("no marks", [])


def test_targets_are_met_or_missed_by_the_rows():
    found = {target.sentence.partition(":")[0]: target for target in judge(MEASURED)}
    assert found["decode, batch 1"].verdict == "met"  # the last of two that begin so: 240 tokens/s
    sentences = verdicts(MEASURED)
    assert sentences["decode, batch 64: at least 75 % of the roofline: 70 %"] == "missed"
    assert sentences["decode, batch 64: at least 9700 tokens/s on an H200: 9,000"] == "missed"
    assert sentences["mixed trace: at least 4 times transformers' continuous batching: 4.5"] == "met"
    assert sentences["decode, batch 256: at least 75 % of the roofline"] == "not measured"


def test_figures_for_an_h200_are_not_judged_on_another_card():
    other = [outcome("text", [decode(1, 180.0, 0.8)], about={"device": "NVIDIA H100 80GB HBM3"})]
    assert verdicts(other)["decode, batch 1: at least 240 tokens/s on an H200: 180"] == "other card"
    assert verdicts(other)["decode, batch 1: at least 75 % of the roofline: 80 %"] == "met"


def test_the_highest_idle_share_counts():
    rows = [{"kind": "idle", "batch": 1, "idle_between": 0.01}, {"kind": "idle", "batch": 64, "idle_between": 0.05}]
    sentence = "the device waits for the host in decodes: less than 3 % of the time: 5 %"
    assert verdicts([outcome("text", rows)])[sentence] == "missed"


def test_every_column_has_a_heading_and_cells_do_not_break_the_table():
    row = {"kind": "mixed", "engine": "x", "load": "l", "config": "paged|sdpa", "output_tok_s": 12345.6}
    (made,) = tables_of(outcome("peer", [row]))
    assert "paged\\|sdpa" in made and "12,346" in made
    assert all(heading for one in TABLES.values() for heading in one.columns.values())
