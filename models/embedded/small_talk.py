"""Greetings, and the short honest answer to whatever is outside the tasks."""

import random

from models.embedded.exchange import Exchange, phrase, recase
from models.embedded.split import Split
from models.embedded.vocabulary import CITIES, COUNTRIES, TOPICS, word

LIMITS = (
    "I can only greet, add, subtract, multiply, compare, count, copy, reverse, remember names, fill JSON "
    "and tell stories."
)


def greeting(rng: random.Random, split: Split) -> Exchange:
    asks, answers = rng.choice(_SMALL_TALK)
    return Exchange("greeting", phrase(rng, list(asks)), answers)


def unknown(rng: random.Random, split: Split) -> Exchange:
    """Input outside the tasks gets one short honest answer instead of nonsense."""
    if rng.random() < 0.27:
        count = rng.randint(1, 8)
        user = " ".join(word(rng, 0.5) for _ in range(count)) + rng.choice(["", ".", "?", "!"])
        return Exchange("unknown", recase(rng, user), LIMITS)
    topic = rng.choice(TOPICS) if rng.random() < 0.7 else word(rng, 0.6)
    asks = [ask.format(x=topic, p=rng.choice(CITIES), c=rng.choice(COUNTRIES)) for ask in _OUTSIDE]
    return Exchange("unknown", phrase(rng, asks), LIMITS)


_HELLO = "Hello! How can I help you?"
_SMALL_TALK: list[tuple[tuple[str, ...], str]] = [
    (("Hello!", "Hello", "Hello!", "Hello there!", "Hello, how can you help me?"), _HELLO),
    (("Hi!", "Hi", "Hi there!", "Hey!", "Hey there", "Hallo!", "Greetings!", "Hi, nice to meet you."), _HELLO),
    (("Good morning!", "Good morning to you."), "Good morning! How can I help you?"),
    (("Good evening!",), "Good evening! How can I help you?"),
    (
        ("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?"),
        "I am well, thank you!",
    ),
    (("Thanks!", "Thank you!", "Thank you very much.", "Thanks a lot!", "Great, thanks!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Bye bye", "See you later!", "Good night!", "See you."), "Goodbye!"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Are you a robot?"),
        "I am Tandem, a small language model.",
    ),
    (("What can you do?", "Help!", "Help", "What do you know?", "How can you help me?", "Can you help me?"), LIMITS),
    (
        ("Well done!", "Good.", "Great!", "Nice.", "Cool!", "Ok.", "Okay", "I see.", "Very good!", "Wow!"),
        "I am glad you like it.",
    ),
    (
        ("The weather is nice today.", "It is raining.", "I like music.", "I am tired.", "Today is a good day."),
        "Thank you for telling me.",
    ),
]

_OUTSIDE = [
    "What is the capital of {c}?",
    "Who is the president of {c}?",
    "Explain {x}.",
    "What is {x}?",
    "Write a poem about {x}.",
    "Translate {x} to French.",
    "Write a python function for {x}.",
    "How do I learn {x}?",
    "Why is the sky blue?",
    "What is the meaning of life?",
    "What time is it?",
    "What day is it today?",
    "How old are you?",
    "Who won the game?",
    "What do you think about {x}?",
    "Give me a recipe for {x}.",
    "How far is {p}?",
    "How many people live in {p}?",
    "Where is {p}?",
    "Summarize {x}.",
    "Write an essay about {x}.",
    "What is the best {x}?",
    "Who invented {x}?",
    "Write code for {x}.",
    "Tell me a joke.",
    "Sing a song about {x}.",
    "Draw {x}.",
    "Play {x}.",
    "Do you like {x}?",
    "What will the weather be tomorrow?",
    "Recommend a book about {x}.",
    "Is {x} good?",
    "Divide 12 by 4.",
    "What is 8 / 2?",
    "How does {x} work?",
    "When was {x} invented?",
    "Define {x}.",
    "Can you fly?",
    "I need {x}.",
    "Find {x} in {p}.",
]
