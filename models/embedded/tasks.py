"""The tasks of the embedded text models by name; recall, which needs several turns, lives in chats.py."""

import random

from models.embedded.exchange import Exchange, Task
from models.embedded.number_tasks import addition, comparison, count_range, product, subtraction, too_large
from models.embedded.small_talk import greeting, unknown
from models.embedded.split import Split
from models.embedded.word_tasks import copying, json_record, reversing, storytelling, word_count


def counting(rng: random.Random, split: Split) -> Exchange:
    """Mostly counting from one number to another, sometimes how long a list is."""
    return (word_count if rng.random() < 0.25 else count_range)(rng, split)


TASKS: dict[str, Task] = {
    "addition": addition,
    "subtraction": subtraction,
    "product": product,
    "comparison": comparison,
    "counting": counting,
    "copying": copying,
    "reversing": reversing,
    "json": json_record,
    "story": storytelling,
    "greeting": greeting,
    "unknown": unknown,
    "too_large": too_large,
}
