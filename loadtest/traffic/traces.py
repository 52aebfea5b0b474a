"""Recorded traffic, read from the files that others publish: who asked when, for how much. Traces hold no prompts.

    azure      AzureLLMInferenceTrace_*.csv (Patel et al., Splitwise, 2024): TIMESTAMP,ContextTokens,GeneratedTokens,
               TIMESTAMP as `2023-11-16 18:15:46.6805900`
    mooncake   conversation_trace.jsonl (Qin et al., Mooncake, FAST 2025): {"timestamp": ms, "input_length",
               "output_length", "hash_ids"}, an id per 512-token block: equal ids, equal prefixes
    image      a request a line, as vLLM-Omni's diffusion traces have them: {"timestamp": s, "width", "height",
               "num_inference_steps", "slo_ms"}, the last two optional

`samples/` has a few lines of each shape, made up here to show the shape and to test with; they are no recordings.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parent / "samples"
SAMPLE_FILES = {"azure": "azure.csv", "mooncake": "mooncake.jsonl", "image": "image.jsonl"}
MOONCAKE_BLOCK_TOKENS = 512


class TraceError(ValueError):
    """The file is not what its shape promises; the message has file, line and field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextArrival:
    """One recorded text request."""

    at_s: float
    """From the first request of the trace."""
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks of `MOONCAKE_BLOCK_TOKENS`, where the trace tells them: equal ids, equal tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageArrival:
    """One recorded image request."""

    at_s: float
    width: int
    height: int
    num_steps: int | None = None
    deadline_s: float | None = None


Arrival = TextArrival | ImageArrival


def read_trace(shape: str, path: Path | None = None) -> list[Arrival]:
    """The arrivals of a file, or of our sample, in order of time from 0. Raises TraceError."""
    if shape not in READERS:
        raise TraceError(f"trace shape {shape!r} does not exist; choose from {', '.join(READERS)}")
    file = path or SAMPLES / SAMPLE_FILES[shape]
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            arrivals = READERS[shape](lines)
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror}") from None
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from None
    if not arrivals:
        raise TraceError(f"{file}: no requests in it")
    return arrivals


def read_azure(lines: Iterable[str]) -> list[Arrival]:
    """Rows of the Azure LLM inference traces."""
    rows = csv.DictReader(lines)
    found = [
        (_time(row, number), _count(row, "ContextTokens", number), _count(row, "GeneratedTokens", number))
        for number, row in enumerate(rows, 2)
    ]
    begin = min((at for at, _, _ in found), default=0.0)
    arrivals = (TextArrival(at_s=at - begin, num_prompt=asked, num_output=given) for at, asked, given in found)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def read_mooncake(lines: Iterable[str]) -> list[Arrival]:
    """Lines of Mooncake's traces. Times are milliseconds there."""
    found = [
        TextArrival(
            at_s=_number(record, "timestamp", number) / 1e3,
            num_prompt=_count(record, "input_length", number),
            num_output=_count(record, "output_length", number),
            blocks=_blocks(record, number),
        )
        for number, record in _records(lines)
    ]
    return _from_zero(found)


def read_images(lines: Iterable[str]) -> list[Arrival]:
    """Lines of diffusion traces."""
    found = []
    for number, record in _records(lines):
        slo_ms = record.get("slo_ms")
        steps = record.get("num_inference_steps")
        found.append(
            ImageArrival(
                at_s=_number(record, "timestamp", number),
                width=_count(record, "width", number),
                height=_count(record, "height", number),
                num_steps=None if steps is None else _count(record, "num_inference_steps", number),
                deadline_s=None if slo_ms is None else _number(record, "slo_ms", number) / 1e3,
            )
        )
    return _from_zero(found)


READERS: dict[str, Callable[[Iterable[str]], list[Arrival]]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "image": read_images,
}


def _from_zero(found: list[Any]) -> list[Arrival]:
    """In order, the first at 0."""
    begin = min((arrival.at_s for arrival in found), default=0.0)
    return sorted((replace(arrival, at_s=arrival.at_s - begin) for arrival in found), key=lambda one: one.at_s)


def _records(lines: Iterable[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise TraceError(f"line {number} is not JSON") from None
        if not isinstance(record, dict):
            raise TraceError(f"line {number} is not a JSON object")
        yield number, record


def _time(row: dict[str, str], number: int) -> float:
    """Seconds. The traces have seven digits behind the point, one more than datetime reads."""
    text = row.get("TIMESTAMP") or ""
    whole, _, fraction = text.partition(".")
    try:
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction.rstrip('Z') or 0}")
    except ValueError:
        raise TraceError(f"line {number}: TIMESTAMP {text!r} is no date and time") from None


def _number(record: dict[str, Any], name: str, number: int) -> float:
    try:
        value = float(record[name])
    except (KeyError, TypeError, ValueError):
        raise TraceError(f"line {number}: {name} is {record.get(name)!r}; a number is needed") from None
    if not 0 <= value < 1e12:
        raise TraceError(f"line {number}: {name} is {value:g}; a number from 0 is needed")
    return value


def _count(record: dict[str, Any], name: str, number: int) -> int:
    return int(_number(record, name, number))


def _blocks(record: dict[str, Any], number: int) -> tuple[int, ...]:
    blocks = record.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise TraceError(f"line {number}: hash_ids is not a list of whole numbers")
    return tuple(blocks)
