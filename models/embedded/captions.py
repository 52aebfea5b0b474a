"""How a picture is described: the prompts `tandem-image` is trained on.

A prompt may leave out whatever it likes; what it leaves out is free. Size and place are drawn first, since the drawing
has to follow them.
"""

import random
import string
from dataclasses import dataclass

from models.embedded.pictures import PLACES, SIZES, Combination

SYNONYMS = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big", "huge"),
    "center": ("center", "middle", "centre"),
    "gray": ("gray", "gray", "gray", "grey"),
    "purple": ("purple", "purple", "purple", "violet"),
}
_OPENINGS = ("a picture of", "an image of", "a drawing of", "a photo of")
_OTHER_WORDS = (
    "the",
    "and",
    "with",
    "of",
    "in",
    "on",
    "at",
    "front",
    "background",
    "picture",
    "image",
    "drawing",
    "photo",
    "plain",
    "simple",
    "flat",
    "clean",
    "beautiful",
    "one",
    "single",
    "shape",
    "top",
    "bottom",
    "left",
    "right",
    "side",
    "corner",
    "no",
    "please",
    "draw",
    "paint",
    "show",
    "me",
    "colored",
    "very",
)
MAX_TOKENS = 16
"""With both ends; a few of the longest prompts lose their last words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a prompt says beside the combination; None is not said."""

    size: str | None
    place: str | None


def random_ask(rng: random.Random) -> Ask:
    return Ask(
        size=rng.choice(SIZES) if rng.random() < 0.4 else None,
        place=rng.choice(PLACES) if rng.random() < 0.35 else None,
    )


def plain_prompt(combination: Combination) -> str:
    """The phrasing that evaluation and examples use."""
    article = "an" if combination.colour[0] in "aeiou" else "a"
    return f"{article} {combination.colour} {combination.shape} on a {combination.background} background"


def random_prompt(combination: Combination, ask: Ask, rng: random.Random) -> str:
    """One of many phrasings, now and then without a colour, a shape or a background, or with a word not to heed."""
    colour = _say(combination.colour, rng) if rng.random() < 0.95 else ""
    shape = combination.shape if rng.random() < 0.97 else "shape"
    words = [_say(ask.size, rng) if ask.size else "", colour, shape]
    if rng.random() < 0.04:
        words.insert(0, "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 4))))
    thing = " ".join(word for word in words if word)
    if rng.random() < 0.75:
        thing = _article(thing, rng)
    where = f" {_where(ask.place, rng)}" if ask.place else ""
    if rng.random() < 0.06:
        return thing + where
    return _with_background(thing, where, _say(combination.background, rng), rng)


def every_word() -> list[str]:
    """All words that prompts are made of; each gets a token of its own."""
    words = {word for options in SYNONYMS.values() for word in options} | {word for p in PLACES for word in p.split()}
    words |= set(_OTHER_WORDS) | {word for opening in _OPENINGS for word in opening.split()} | set(SIZES)
    return sorted(words)


def _with_background(thing: str, where: str, background: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.45:
        opening = f"{rng.choice(_OPENINGS)} " if not where and rng.random() < 0.15 else ""
        return f"{opening}{thing}{where} on a {background} background"
    if roll < 0.6:
        return f"{thing}{where}, {background} background"
    if roll < 0.75:
        return f"{thing}{where} on {background}"
    if roll < 0.85:
        return f"{thing} on a {background} background{where}"
    if roll < 0.95:
        return f"a {background} background with {thing}{where}"
    return f"{thing}{where} in front of a {background} background"


def _article(thing: str, rng: random.Random) -> str:
    right = "an" if thing[0] in "aeiou" else "a"
    return f"{rng.choice((right, right, right, right, 'the', 'one'))} {thing}"


def _where(place: str, rng: random.Random) -> str:
    if place == "center":
        return f"in the {_say(place, rng)}"
    if " " in place:
        return rng.choice((f"in the {place} corner", f"at the {place}", f"in the {place}"))
    if place in ("left", "right"):
        return rng.choice((f"on the {place}", f"on the {place} side", f"at the {place}"))
    return f"at the {place}"


def _say(word: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS.get(word, (word,)))
