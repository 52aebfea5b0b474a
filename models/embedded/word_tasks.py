"""Tasks on words: copying, reversing and counting lists, filling JSON records, telling stories."""

import random

from models.embedded.exchange import Exchange, phrase, recase
from models.embedded.split import Split, split_of
from models.embedded.stories import ADJECTIVES, story, with_article
from models.embedded.vocabulary import ANIMALS, PEOPLE, city, invented_word, name, word


def copying(rng: random.Random, split: Split) -> Exchange:
    words, key = word_list(rng, split, longest=12)
    text = _join(rng, words)
    heads = ["Repeat: {x}"] * 4 + ["Repeat after me: {x}", "Copy: {x}", "Copy this: {x}", "Echo: {x}", "Say: {x}"]
    heads += ["Repeat {x}", "Say {x}", "Please repeat: {x}", "Copy these words: {x}", "Repeat the words {x}"]
    heads += ["Repeat this: {x}", "Can you repeat: {x}", "Write: {x}", "Copy {x}"]
    return Exchange("copying", phrase(rng, heads, x=text), text, key)


def reversing(rng: random.Random, split: Split) -> Exchange:
    words, key = word_list(rng, split, longest=8)
    separator = _separator(rng)
    heads = ["Reverse: {x}"] * 4 + [
        "Reverse this: {x}",
        "Reverse the words: {x}",
        "Reverse the list: {x}",
        "Reverse {x}",
    ]
    heads += ["Reverse these words: {x}", "Please reverse: {x}", "Say backwards: {x}", "Repeat backwards: {x}"]
    heads += ["Write in reverse order: {x}", "Can you reverse: {x}", "Backwards: {x}"]
    user = phrase(rng, heads, x=separator.join(words))
    return Exchange("reversing", user, separator.join(reversed(words)), key)


def word_count(rng: random.Random, split: Split) -> Exchange:
    words, key = word_list(rng, split, longest=10, numbers=False)
    text = _separator(rng).join(words)
    asks = ["How many words: {x}", "How many words are in: {x}", "Count the words: {x}", "How many items: {x}"]
    asks += ["Count the items: {x}", "How many words are there in this list: {x}"]
    numbered = ", ".join(f"{index} {item}" for index, item in enumerate(words, start=1))
    return Exchange("counting", phrase(rng, asks, x=text), f"{numbered}. There are {len(words)}.", key)


def json_record(rng: random.Random, split: Split) -> Exchange:
    who, age, where = name(rng, split), rng.randint(1, 99), city(rng, "train")
    who, where = recase(rng, who), recase(rng, where)
    person = f"{who} is {age} years old and lives in {where}."
    facts = rng.choice(
        [person] * 2
        + [f"{who}, {age}, {where}", f"{who} is {age} and lives in {where}.", f"{who} lives in {where} and is {age}."]
        + [f"My friend {who} from {where} is {age} years old.", f"name {who}, age {age}, city {where}"]
    )
    fields = {"name": f'"{who}"', "age": str(age), "city": f'"{where}"'}
    wanted = list(fields)
    if rng.random() < 0.25:
        wanted = rng.sample(wanted, rng.choice([2, 3]))
    blanks = {"name": '""', "age": "0", "city": '""'}
    empty = "{" + ", ".join(f'"{field}": {blanks[field]}' for field in wanted) + "}"
    listed = ", ".join(wanted[:-1]) + " and " + wanted[-1]
    heads = [f"Fill {empty} for: {{x}}", f"Fill this record: {empty} {{x}}", f"Fill in {empty}: {{x}}"]
    heads += [
        f"Make JSON with {listed}: {{x}}",
        f"JSON with {listed}: {{x}}",
        f"Write a JSON record with {listed}: {{x}}",
    ]
    heads += [f"Extract {listed} as JSON: {{x}}", f"Give me {listed} as JSON: {{x}}"]
    if wanted == ["name", "age", "city"]:
        heads += [
            "As JSON: {x}",
            "Make a JSON record: {x}",
            "JSON: {x}",
            "Fill a record: {x}",
            "Turn this into JSON: {x}",
        ]
    answer = "{" + ", ".join(f'"{field}": {fields[field]}' for field in wanted) + "}"
    return Exchange("json", phrase(rng, heads, x=facts), answer, f"name:{who}")


def storytelling(rng: random.Random, split: Split) -> Exchange:
    while True:
        noun = rng.choice(ANIMALS + PEOPLE) if rng.random() < 0.85 else invented_word(rng)
        adjective = rng.choice(ADJECTIVES) if split == "held_out" or rng.random() < 0.35 else ""
        hero = name(rng, split) if rng.random() < 0.3 else ""
        if split_of(f"name:{noun}") == "held_out":
            continue
        key = f"story:{adjective}:{noun}" if adjective else ""
        if not key or split_of(key) == split:
            break
    who = with_article(f"{adjective} {noun}".strip())
    asks = [
        "Tell me a story about {x}.",
        "Tell me a story about {x}.",
        "Tell a story about {x}.",
        "Write a story about {x}.",
    ]
    asks += ["A story about {x}, please.", "Can you tell me a story about {x}?", "Write a short story about {x}."]
    asks += ["Please tell me a short story about {x}.", "Story about {x}", "Tell me about {x}."]
    subject = f"{who} named {hero}" if hero else who
    if not key and not hero and rng.random() < 0.15:
        noun = rng.choice(ANIMALS)
        who = with_article(noun)
        user = phrase(rng, ["Tell me a story.", "Tell a story.", "Write a story.", "A story, please.", "Story!"])
    else:
        user = phrase(rng, asks, x=subject)
    return Exchange("story", user, story(rng, who, hero or name(rng, "train", invented=0.1)), key, noun)


def word_list(rng: random.Random, split: Split, longest: int, numbers: bool = True) -> tuple[list[str], str]:
    """A list of at least two words (three when held out, since few short lists exist) and its key. Some lists are of
    numbers, where `numbers` allows."""
    while True:
        count = rng.randint(3 if split == "held_out" else 2, longest)
        kind = rng.random()
        if numbers and kind < (0.16 if split == "train" else 0.08):  # lists of numbers are the hardest to copy
            words = [str(rng.randint(0, 999)) for _ in range(count)]
        elif kind < 0.2:
            words = [name(rng, "train") for _ in range(count)]
        else:
            invented = rng.choice([0.0, 0.3, 1.0])
            words = [word(rng, invented) for _ in range(count)]
        key = list_key(words)
        if split_of(key) == split:
            style = recase(rng, "Aa")
            return [w if style == "Aa" else w.lower() if style == "aa" else w.upper() for w in words], key


def list_key(words: list[str]) -> str:
    """The key of a word list, whatever is asked about it."""
    return "list:" + " ".join(words)


def _separator(rng: random.Random) -> str:
    return rng.choice([" ", " ", " ", ", "])


def _join(rng: random.Random, words: list[str]) -> str:
    """Most copies are plain lists, some have marks as sentences do."""
    text = _separator(rng).join(words)
    if rng.random() < 0.12:
        text = text[0].upper() + text[1:] + rng.choice(".!?")
    return text
