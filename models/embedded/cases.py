"""Held-out test cases of the embedded text models: messages, the right answer, and the check of an answer.

Needs no tensors, so that the same cases are asked in-process and over HTTP.
"""

import random
from dataclasses import dataclass

from models.embedded.chats import Chat, Message, as_chat, recall_chat
from models.embedded.stories import is_story
from models.embedded.tasks import TASKS

CASE_TASKS = [*TASKS, "recall", "distant_recall"]
"""Every task with cases. In greetings and unknown input nothing is held out, since nothing is learnt by heart."""

DISTANT_TURNS = (38, 44)
"""Turns between fact and question in distant recall: prompts of about 2000 tokens."""

ARITHMETIC = ("addition", "subtraction", "product")


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and what must come back."""

    task: str
    messages: list[Message]
    expected: str
    subject: str = ""
    """What a story must be about; stories are checked against the grammar, since many are right."""

    @property
    def chat(self) -> Chat:
        """The case with its right answer, as a conversation."""
        return Chat(
            [*self.messages, {"role": "assistant", "content": self.expected}], [], [self.task] * self.num_answers
        )

    @property
    def num_answers(self) -> int:
        return 1 + sum(message["role"] == "assistant" for message in self.messages)


def held_out_cases(task: str, n: int, seed: int = 0) -> list[Case]:
    """`n` cases whose operands, word lists or names were never trained on."""
    if task not in CASE_TASKS:
        raise ValueError(f"task is {task!r}; the tasks with cases are {', '.join(CASE_TASKS)}")
    rng = random.Random(f"{task}:{seed}")
    return [_case(task, rng) for _ in range(n)]


def is_correct(answer: str, case: Case) -> bool:
    """Whether `answer` is right: word for word, but for stories, which must fit the grammar and their subject."""
    if case.task == "story":
        return is_story(answer.strip(), case.subject)
    return answer.strip() == case.expected


def _case(task: str, rng: random.Random) -> Case:
    if task in ("recall", "distant_recall"):
        chat, _ = recall_chat(rng, "held_out", *(DISTANT_TURNS if task == "distant_recall" else (1, 6)))
        return Case(task, chat.messages[:-1], chat.messages[-1]["content"])
    exchange = TASKS[task](rng, "held_out")
    chat = as_chat(exchange)
    return Case(task, chat.messages[:-1], exchange.answer, exchange.subject)
