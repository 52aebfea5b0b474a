"""What is aimed at on one H200, and whether it was met, read from the measured rows. Nothing is met that has no row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from loadtest.gpu.bench import Outcome

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """`verdict`: met, missed, not measured, or other card (an absolute figure meant for an H200)."""

    verdict: str
    sentence: str


def judge(outcomes: Iterable[Outcome]) -> list[Target]:
    outcomes = list(outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    is_h200 = any("H200" in outcome.about.get("device", "") for outcome in outcomes)

    def at(kind: str, **wanted: Any) -> Rows:
        return [
            row for row in rows if row["kind"] == kind and all(row.get(name) == value for name, value in wanted.items())
        ]

    decodes = at("decode")
    targets = [
        _least(
            f"decode, batch {batch}: at least 75 % of the roofline", at("decode", batch=batch), "roofline", 0.75, _share
        )
        for batch in (1, 8, 32, 64, 128, 256)
    ]
    for batch, rate in ((1, 240), (64, 9700)):
        sentence = f"decode, batch {batch}: at least {rate} tokens/s on an H200"
        found = at("decode", batch=batch)
        if decodes and not is_h200:
            targets.append(Target("other card", sentence + _seen(found, "tok_s", _plain)))
        else:
            targets.append(_least(sentence, found, "tok_s", rate, _plain))
    targets.append(
        _most("the device waits for the host in decodes: less than 3 % of the time", at("idle"), "idle_between", 0.03)
    )
    targets.append(
        _least("prefill of 8192 tokens: at least 60 % MFU", at("prefill", tokens=8192, prompts=1), "mfu", 0.6, _share)
    )
    targets.append(_beside_peer(at("mixed", load="all at once")))
    for name, share in (("DiT-XL/2", 0.5), ("FLUX", 0.6)):
        found = [row for row in at("images") if row["model"].startswith(name)]
        best = sorted(found, key=lambda row: row["matmul_share"])[-1:]
        sentence = f"{name}, at its best number of rows: at least {100 * share:.0f} % of the measured matrix rate"
        targets.append(_least(sentence, best, "matmul_share", share, _share))
    starts = at("cold", start="kernels compiled before")
    targets.append(
        _most("process start to first token, 8 B shape: at most 15 s", starts[-1:], "first_token_s", 15.0, _seconds)
    )
    return targets


def _beside_peer(rows: Rows) -> Target:
    sentence = "mixed trace: at least 4 times transformers' continuous batching"
    ours = [row["output_tok_s"] for row in rows if row["engine"] == "tandem"]
    theirs = [row["output_tok_s"] for row in rows if row["engine"] != "tandem"]
    if not ours or not theirs:
        return Target("not measured", sentence)
    ratio = ours[-1] / theirs[-1]
    return Target("met" if ratio >= 4 else "missed", f"{sentence}: {ratio:.1f}")


def _least(sentence: str, rows: Rows, column: str, bound: float, write: Callable[[float], str]) -> Target:
    """Every row has to reach it."""
    if not rows:
        return Target("not measured", sentence)
    lowest = min(row[column] for row in rows)
    return Target("met" if lowest >= bound else "missed", f"{sentence}: {write(lowest)}")


def _most(
    sentence: str, rows: Rows, column: str, bound: float, write: Callable[[float], str] = lambda share: _share(share)
) -> Target:
    if not rows:
        return Target("not measured", sentence)
    highest = max(row[column] for row in rows)
    return Target("met" if highest <= bound else "missed", f"{sentence}: {write(highest)}")


def _seen(rows: Rows, column: str, write: Callable[[float], str]) -> str:
    return f": {write(rows[-1][column])}" if rows else ""


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _plain(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"
