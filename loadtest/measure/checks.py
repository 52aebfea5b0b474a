"""Whether what came is what was asked for. Done when the clock has stopped.

text    as many tokens as asked, where the end token is ignored; the server's counts against a tokenizer
images  decode, have the asked size, are not of one colour; equal requests (prompt, seed, size, steps) give equal
        files
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from loadtest.measure.outcome import Outcome
from loadtest.targets.target import Failed, Spool
from loadtest.traffic.ask import ImageAsk, TextAsk

NUM_COUNTED = 20
"""Requests whose tokens are counted again."""
LEVELS = 1
"""Of 255. What a change of the last bit of a float can do to a pixel; more is another picture."""


@dataclass(slots=True)
class Report:
    """What was checked, and what was wrong."""

    texts: int = 0
    wrong_length: int = 0
    images: int = 0
    undecodable: int = 0
    wrong_size: int = 0
    blank: int = 0
    repeated: int = 0
    """Images asked for before, seed and all."""
    different_hash: int = 0
    largest_difference: int = 0
    """Between two pictures of the same request, in levels of 255."""
    counted: int = 0
    prompt_tokens_off: float | None = None
    """Sum of the differences between usage and tokenizer, as a share of the tokens."""
    output_tokens_off: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_wrong(self) -> int:
        is_other = self.different_hash if self.largest_difference > LEVELS else 0
        return self.wrong_length + self.undecodable + self.wrong_size + self.blank + is_other


def check_texts(outcomes: Sequence[Outcome], report: Report, *, is_eos_ignored: bool) -> None:
    """Marks answers of another length than asked."""
    for outcome in outcomes:
        ask = outcome.ask
        if not outcome.is_ok or not isinstance(ask, TextAsk):
            continue
        report.texts += 1
        if not outcome.output_tokens:
            outcome.output_tokens = len(outcome.contents)
            report.notes.append("a server told no usage; a piece of output was counted as a token")
        is_wrong = outcome.output_tokens != ask.num_output if is_eos_ignored else outcome.output_tokens > ask.num_output
        if is_wrong:
            outcome.flaw = f"{outcome.output_tokens} tokens where {ask.num_output} were asked"
            report.wrong_length += 1
    report.notes = list(dict.fromkeys(report.notes))


def check_images(outcomes: Sequence[Outcome], report: Report, spool: Spool) -> None:
    """Replaces each outcome's spooled answers by its pictures, and marks what is wrong with them."""
    seen: dict[tuple[ImageAsk, int], tuple[str, np.ndarray]] = {}
    for outcome in outcomes:
        if not isinstance(outcome.ask, ImageAsk) or not outcome.pictures:
            continue
        stored, outcome.pictures = outcome.pictures, []
        for place in stored:
            for data in _files(spool.get(place), outcome, report):
                report.images += 1
                number = len(outcome.pictures)
                outcome.pictures.append(place)
                flaw, pixels = _flaw(data, outcome, report)
                outcome.flaw = outcome.flaw or flaw
                if pixels is not None and outcome.ask.seed is not None:
                    _compare((_as_asked(outcome.ask), number), data, pixels, outcome, report, seen)
        if not outcome.pictures and outcome.is_ok:
            outcome.flaw = outcome.flaw or "an answer without an image"


async def check_counts(
    outcomes: Sequence[Outcome],
    report: Report,
    count: Callable[[str], Awaitable[int]],
    count_prompt: Callable[[str], Awaitable[int]],
) -> None:
    """The server's usage of some requests against a tokenizer. Text cut into tokens again may come to fewer: random
    output has pieces that a tokenizer would have joined."""
    texts = [one for one in outcomes if one.is_ok and isinstance(one.ask, TextAsk) and one.ask.group == "text"]
    first_turns = {id(one.ask) for one in texts}
    for one in texts:  # later turns carry a history that is not kept
        assert isinstance(one.ask, TextAsk)
        follow_up = one.ask.follow_up
        while follow_up is not None:
            first_turns.discard(id(follow_up))
            follow_up = follow_up.follow_up
    chosen = random.Random(0).sample(texts, min(NUM_COUNTED, len(texts)))
    sums = np.zeros(4)
    try:
        for one in chosen:
            assert isinstance(one.ask, TextAsk)
            if id(one.ask) in first_turns:
                sums[0] += abs(await count_prompt(one.ask.prompt) - one.prompt_tokens)
                sums[1] += one.prompt_tokens
            sums[2] += abs(await count("".join(one.text)) - one.output_tokens)
            sums[3] += one.output_tokens
    except Failed as error:
        report.notes.append(f"token counts were not checked: {error}")
        return
    report.counted = len(chosen)
    report.prompt_tokens_off = float(sums[0] / sums[1]) if sums[1] else None
    report.output_tokens_off = float(sums[2] / sums[3]) if sums[3] else None


def _files(stored: bytes, outcome: Outcome, report: Report) -> list[bytes]:
    """The image files of an answer: JSON of an API, or the file itself. Notes what the server tells beside them."""
    if not stored.lstrip().startswith(b"{"):
        return [stored]
    answer: dict[str, Any] = json.loads(stored)
    told = answer.get("size") or ""
    if isinstance(told, str) and "x" in told and told.replace("x", "").isdigit():
        width, _, height = told.partition("x")
        outcome.size = (int(width), int(height))
    outcome.num_steps = answer.get("num_inference_steps") or outcome.num_steps
    found = []
    for entry in answer.get("data") or [answer]:
        if entry.get("b64_json"):
            try:
                found.append(base64.b64decode(entry["b64_json"], validate=True))
            except binascii.Error:
                found.append(b"")
        elif "url" in entry:
            report.notes = list(dict.fromkeys([*report.notes, "images came as URLs and were not looked at"]))
    return found


def _flaw(data: bytes, outcome: Outcome, report: Report) -> tuple[str, np.ndarray | None]:
    ask = outcome.ask
    assert isinstance(ask, ImageAsk)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError):
        report.undecodable += 1
        return "an image that cannot be decoded", None
    height, width = pixels.shape[:2]
    outcome.num_steps = outcome.num_steps or ask.num_steps
    outcome.size = (width, height)
    if ask.width and ask.height and (width, height) != (ask.width, ask.height):
        report.wrong_size += 1
        return f"an image of {width}x{height} where {ask.width}x{ask.height} was asked", pixels
    if (pixels == pixels[0, 0]).all():
        report.blank += 1
        return "a blank image", pixels
    return "", pixels


def _as_asked(ask: ImageAsk) -> ImageAsk:
    """Without what has no effect on the picture."""
    return ImageAsk(
        prompt=ask.prompt,
        width=ask.width,
        height=ask.height,
        num_steps=ask.num_steps,
        guidance=ask.guidance,
        seed=ask.seed,
        negative_prompt=ask.negative_prompt,
    )


def _compare(
    key: tuple[ImageAsk, int],
    data: bytes,
    pixels: np.ndarray,
    outcome: Outcome,
    report: Report,
    seen: dict[tuple[ImageAsk, int], tuple[str, np.ndarray]],
) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if key not in seen:
        seen[key] = (digest, pixels)
        return
    report.repeated += 1
    before, earlier = seen[key]
    if before != digest:
        report.different_hash += 1
        same_shape = earlier.shape == pixels.shape
        difference = int(np.abs(earlier.astype(int) - pixels).max()) if same_shape else 255
        report.largest_difference = max(report.largest_difference, difference)
        if difference > LEVELS:
            outcome.flaw = outcome.flaw or "another image than the same request gave before"
