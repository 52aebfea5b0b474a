"""Conversations: exchanges of tasks.py in a row, with facts told early and asked for later.

Recall is the one task that spans turns: somebody says a name, a colour, a place or a pet, other things are talked
about, then the question comes. The last value told counts; a question about something never told gets an honest
answer.
"""

import random
from dataclasses import dataclass

from models.embedded.exchange import Exchange, vary
from models.embedded.split import Split
from models.embedded.tasks import TASKS
from models.embedded.vocabulary import COLOURS, city, name, name_key

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a user can tell and later ask for."""

    tellings: tuple[str, ...]
    reply: str
    questions: tuple[str, ...]
    answer: str
    not_told: str


FACTS = {
    "name": Fact(
        (
            *("My name is {x}.", "My name is {x}.", "I am {x}.", "I'm {x}.", "Call me {x}.", "Hello, my name is {x}."),
            *("Hi, I am {x}.", "My name is {x}, nice to meet you.", "You can call me {x}.", "Hi! I'm {x}."),
            *("Please remember that my name is {x}.", "The name is {x}.", "Hello! My name is {x}."),
        ),
        "Nice to meet you, {x}!",
        (
            *("What is my name?", "What is my name?", "What's my name?", "Do you know my name?", "Who am I?"),
            *("Do you remember my name?", "Can you tell me my name?", "Say my name.", "Tell me my name."),
            *("What was my name?", "So what is my name?", "Please tell me my name."),
        ),
        "Your name is {x}.",
        "You have not told me your name.",
    ),
    "colour": Fact(
        (
            "My favourite colour is {x}.",
            "My favorite color is {x}.",
            "I like the colour {x}.",
            "The colour I like is {x}.",
        ),
        "I will remember that you like {x}.",
        (
            "What is my favourite colour?",
            "What is my favorite color?",
            "Which colour do I like?",
            "What colour do I like?",
        ),
        "Your favourite colour is {x}.",
        "You have not told me your favourite colour.",
    ),
    "city": Fact(
        ("I live in {x}.", "I am from {x}.", "My home is {x}.", "I come from {x}.", "My city is {x}."),
        "I will remember that you live in {x}.",
        ("Where do I live?", "Where am I from?", "In which city do I live?", "What is my city?", "Where is my home?"),
        "You live in {x}.",
        "You have not told me where you live.",
    ),
    "pet": Fact(
        ("My pet is called {x}.", "My dog is called {x}.", "I have a cat named {x}.", "My pet's name is {x}."),
        "{x} is a nice name for a pet.",
        ("What is my pet called?", "What is the name of my pet?", "What is my pet's name?", "How is my pet called?"),
        "Your pet is called {x}.",
        "You have not told me about your pet.",
    ),
}

_SYSTEMS = [
    "You are a helpful assistant.",
    "You are Tandem, a small language model.",
    "You are a friendly assistant.",
    "Be brief.",
    "You are a helpful, respectful and honest assistant.",
    "Answer the user.",
    "You are an AI assistant. Answer briefly.",
    "You are a chatbot.",
    "Help the user with small tasks.",
    "You are a test model.",
]

_WEIGHTS = {
    "addition": 20,
    "subtraction": 20,
    "product": 8,
    "comparison": 10,
    "counting": 10,
    "copying": 9,
    "reversing": 10,
    "json": 6,
    "story": 4,
    "greeting": 4,
    "unknown": 4,
    "too_large": 4,
    "tell": 8,
    "ask": 8,
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation ending in an answer, with the keys of everything in it and the task of every answer."""

    messages: list[Message]
    keys: list[str]
    tasks: list[str]


def training_chat(rng: random.Random, num_turns: int | None = None) -> Chat:
    """A conversation with nothing held out in it. Many have one turn; some are built around a recall, since facts told
    and asked for at random meet too rarely."""
    if num_turns is None and rng.random() < 0.2:
        return recall_chat(rng, "train", most_turns=rng.choice([6, 6, 6, 6, 6, 12, 30]))[0]
    turns = num_turns or rng.choices((1, 2, 3, 4, 6, 8), (50, 15, 12, 10, 8, 5))[0]
    builder = _Builder(rng)
    builder.system()
    for kind in rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=turns):
        builder.turn(kind)
    return builder.chat()


def long_chat(rng: random.Random, num_turns: int) -> Chat:
    """A conversation of many turns that starts with facts and asks for each of them once, at any distance. Asked twice,
    a fact would be found in the first answer, which is nearer."""
    builder = _Builder(rng)
    builder.system()
    kinds = rng.sample(list(FACTS), rng.randint(1, len(FACTS)))
    for kind in kinds:
        for _ in range(rng.choice([0, 0, 1, 4])):
            builder.turn("greeting")
        builder.tell(kind, "train")
    asked_at = dict(zip(rng.sample(range(num_turns // 4, num_turns), len(kinds)), kinds, strict=True))
    others = {kind: weight for kind, weight in _WEIGHTS.items() if kind not in ("tell", "ask")}
    for turn, other in enumerate(rng.choices(list(others), list(others.values()), k=num_turns)):
        if turn in asked_at:
            builder.ask(asked_at[turn])
        else:
            builder.turn(other)
    return builder.chat()


def recall_chat(rng: random.Random, split: Split, least_turns: int = 1, most_turns: int = 6) -> tuple[Chat, str]:
    """A name or place of the given split told early, some turns of other things, and the question.

    Returns the chat ending in the right answer, and the value itself. Only the recalled value is of `split`.
    """
    builder = _Builder(rng)
    builder.system()
    kind = rng.choice(["name", "name", "name", "city", "pet"])
    for _ in range(rng.choice([0, 0, 1])):
        builder.turn("greeting")
    builder.tell(kind, split)
    value = builder.facts[kind]
    for _ in range(rng.randint(least_turns, most_turns)):
        builder.turn(rng.choice([other for other in _WEIGHTS if other not in ("tell", "story")]), avoid=kind)
    builder.ask(kind)
    return builder.chat(), value


class _Builder:
    """A conversation while it grows, with what has been told in it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.messages: list[Message] = []
        self.keys: list[str] = []
        self.tasks: list[str] = []
        self.facts: dict[str, str] = {}

    def chat(self) -> Chat:
        return Chat(self.messages, self.keys, self.tasks)

    def system(self) -> None:
        """A third of the conversations have a system prompt; some of those say who the user is."""
        if self.rng.random() < 0.35:
            text = self.rng.choice(_SYSTEMS)
            if self.rng.random() < 0.1:
                self.facts["name"] = name(self.rng, "train")
                self.keys.append(name_key(self.facts["name"]))
                text += f" The user's name is {self.facts['name']}."
            self.messages.append({"role": "system", "content": text})

    def turn(self, kind: str, avoid: str = "") -> None:
        """One turn of training material; `avoid` is a fact that must keep its value."""
        if kind == "tell":
            self.tell(self.rng.choice(list(FACTS) + ["name"] * 3), "train")
        elif kind == "ask":
            self.ask(self.rng.choice([fact for fact in [*FACTS, *self.facts, *self.facts, "name"] if fact != avoid]))
        else:
            exchange = TASKS[kind](self.rng, "train")
            self.keys += [exchange.key] if exchange.key else []
            self.add(exchange.task, exchange.user, exchange.answer)

    def tell(self, kind: str, split: Split) -> None:
        value = self._value(kind, split)
        self.facts[kind] = value
        self.keys += [name_key(value)] if kind != "colour" else []
        told = vary(self.rng, self.rng.choice(FACTS[kind].tellings)).replace("{x}", value).replace("{X}", value)
        self.add("recall", told, FACTS[kind].reply.format(x=value))

    def ask(self, kind: str) -> None:
        fact = FACTS[kind]
        known = self.facts.get(kind)
        answer = fact.answer.format(x=known) if known else fact.not_told
        self.add("recall", vary(self.rng, self.rng.choice(fact.questions)), answer)

    def add(self, task: str, user: str, answer: str) -> None:
        self.tasks.append(task)
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    def _value(self, kind: str, split: Split) -> str:
        if kind == "colour":
            return self.rng.choice(COLOURS)
        value = city(self.rng, split) if kind == "city" else name(self.rng, split)
        draw = self.rng.random()
        return value.lower() if draw < 0.08 else value.upper() if draw < 0.1 else value


def as_chat(exchange: Exchange) -> Chat:
    """One exchange as a conversation of its own."""
    messages = [{"role": "user", "content": exchange.user}, {"role": "assistant", "content": exchange.answer}]
    return Chat(messages, [exchange.key] if exchange.key else [], [exchange.task])
