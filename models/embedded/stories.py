"""Short grammatical stories from a small grammar, and the check that a text is one.

A story is five sentences: who, a wish, an obstacle, help, an end. Every sentence comes from a fixed choice with slots,
so that `is_story` can hold a generated text against the same grammar.
"""

import random
import re

ADJECTIVES = ["small", "brave", "old", "young", "clever", "kind", "shy", "happy", "hungry", "curious", "quiet", "funny"]
_PLACES = [
    "in a green forest",
    "near a blue lake",
    "on a high hill",
    "in a little town",
    "by the sea",
    "in an old house",
]
_WISHES = ["find a friend", "see the sea", "learn to sing", "find a treasure", "build a boat", "touch the moon"]
_WHEN = ["One day", "One morning", "One evening", "One cold night"]
_TROUBLES = ["it began to rain", "a storm came", "the road was gone", "the night was very dark", "a big stone fell"]
_FEELINGS = ["was afraid", "did not give up", "was very sad", "sat down and cried", "had to think"]
_HELPERS = ["a bird", "an old woman", "a wise owl", "a little mouse", "a friendly wolf", "a stranger"]
_HELP = ["showed the way", "shared some bread", "told a secret", "lit a lamp", "sang a song"]
_ENDS = [
    "In the end {name} was happy and went home.",
    "From that day on {name} was never alone.",
    "{name} laughed, and they stayed friends forever.",
    "That night {name} slept well and dreamed of the stars.",
]

# Every pattern is one sentence; a slot in braces is filled from the list of that name, `who` and `name` from the story.
_SLOTS: dict[str, list[str]] = {
    "place": _PLACES,
    "wish": _WISHES,
    "when": _WHEN,
    "trouble": _TROUBLES,
    "feeling": _FEELINGS,
    "helper": _HELPERS,
    "help": _HELP,
}
_SENTENCES: list[list[str]] = [
    ["Once upon a time there was {who} named {name}.", "Long ago {who} named {name} lived {place}."],
    ["{name} wanted to {wish}.", "Every day {name} dreamed of one thing: to {wish}."],
    ["{when} {name} set out, but {trouble}.", "{when} {trouble}, and {name} {feeling}."],
    ["Then {helper} came and {help}.", "But {helper} heard {name} and {help}."],
    _ENDS,
]


def story(rng: random.Random, who: str, name: str) -> str:
    """A story about `who` (with its article) called `name`."""
    sentences = []
    for choices in _SENTENCES:
        filled = {slot: rng.choice(values) for slot, values in _SLOTS.items()}
        sentences.append(rng.choice(choices).format(who=who, name=name, **filled))
    return " ".join(sentences)


def is_story(text: str, subject: str) -> bool:
    """Whether `text` is a story of the grammar, with one name throughout, about `subject`."""
    opening = re.match(r"(?:Once upon a time there was|Long ago) (.+?) named (\w+)", text)
    if opening is None or subject not in opening[1]:
        return False
    slots = {slot: "(?:" + "|".join(map(re.escape, values)) + ")" for slot, values in _SLOTS.items()}
    slots |= {"who": re.escape(opening[1]), "name": re.escape(opening[2])}
    sentences = ["(?:" + "|".join(choice.replace(".", r"\.") for choice in choices) + ")" for choices in _SENTENCES]
    return re.fullmatch(" ".join(sentences).format(**slots), text.strip()) is not None


def with_article(noun: str) -> str:
    """`a fox`, `an owl`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
