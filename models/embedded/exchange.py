"""One question and its one right answer, and how phrasings vary.

Templates vary in wording, case and punctuation; their payload (numbers, words, names) is put in as it is.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from models.embedded.split import Split


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user message and the answer to it. `key` is empty when nothing in it can be learnt by heart."""

    task: str
    user: str
    answer: str
    key: str = ""
    subject: str = ""
    """What a story must be about."""


Task = Callable[[random.Random, Split], Exchange]


def vary(rng: random.Random, text: str) -> str:
    """A phrasing as hurried people type it: without the final mark, without capitals, or all in capitals."""
    if rng.random() < 0.25 and text[-1] in ".?!":
        text = text[:-1]
    draw = rng.random()
    if draw < 0.2:
        return text.lower()
    if draw < 0.24 and '"' not in text:
        return text.upper()
    return text


def phrase(rng: random.Random, templates: list[str], **payload: object) -> str:
    """One template, varied, with its payload put in unchanged. Other braces in templates stay (JSON records)."""
    text = vary(rng, rng.choice(templates))
    for slot, value in payload.items():
        text = text.replace("{" + slot + "}", str(value)).replace("{" + slot.upper() + "}", str(value))
    return text


def recase(rng: random.Random, text: str) -> str:
    draw = rng.random()
    return text.lower() if draw < 0.07 else text.upper() if draw < 0.1 else text
