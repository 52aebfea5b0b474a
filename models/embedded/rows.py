"""Conversations as token rows with a weight for every target, and their packing into padded batches.

One conversation is one row, as at inference; rows of similar length share a batch, so little is padding and nothing can
attend to another conversation. Only answers (and what ends them) are targets.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.embedded.bpe import END_OF_TEXT, IM_END, IM_START, PAD
from models.embedded.chats import Chat, Message, as_chat, long_chat, recall_chat, training_chat
from models.embedded.split import product_split, sum_split
from models.embedded.tasks import TASKS

# Legend: B rows, T positions, S targets of a batch

RESULT_WEIGHT = 2.0
"""Weight of a target after an equals sign: results are few digits among long copies."""
STORY_WEIGHT = 0.3
"""Weight of a target in a story, whose words are free choices."""


_SINGLE = {
    "comparison": 20,
    "counting": 16,
    "copying": 22,
    "reversing": 10,
    "product": 14,
    "too_large": 6,
    "addition": 4,
    "subtraction": 4,
}
"""How often a task has rows of its own."""

BATCHES_PER_POOL = 48


@dataclass(slots=True)
class Row:
    """Token ids, and the weight each has as a target (0 in prompts)."""

    ids: list[int]
    weights: list[float]


@dataclass(slots=True)
class Batch:
    tokens_BT: Tensor
    positions_S: Tensor
    """Flat positions whose next token is a target."""
    targets_S: Tensor
    weights_S: Tensor


class RowMaker:
    """Encodes conversations exactly as the chat template renders them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.special = {token: vocabulary[token] for token in (PAD, END_OF_TEXT, IM_START, IM_END)}
        self._newline = self.encode("\n")
        (self._equals,) = self.encode("=")
        self._heads = {
            role: [self.special[IM_START], *self.encode(role + "\n")] for role in ("system", "user", "assistant")
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "RowMaker":
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, messages: list[Message]) -> list[int]:
        """The ids a model is given to continue `messages` with an answer."""
        ids = []
        for message in messages:
            ids += [
                *self._heads[message["role"]],
                *self.encode(message["content"]),
                self.special[IM_END],
                *self._newline,
            ]
        return ids + self._heads["assistant"]

    def row(self, chat: Chat, only_last: bool = False) -> Row:
        """A conversation with every answer as target, or only the last one."""
        row = Row([], [])
        answers = iter(chat.tasks)
        for index, message in enumerate(chat.messages):
            body = [*self.encode(message["content"]), self.special[IM_END]]
            weight = 0.0
            if message["role"] == "assistant":
                weight = STORY_WEIGHT if next(answers) == "story" else 1.0
                weight = 0.0 if only_last and index < len(chat.messages) - 1 else weight
            head = self._heads[message["role"]]
            row.ids += head + body + self._newline
            row.weights += [0.0] * len(head) + self._weights(body, weight) + [0.0] * len(self._newline)
        return row

    def plain_row(self, rng: random.Random) -> Row:
        """Text without a chat around it, for completion: a sum after its equals sign, a story from its first words."""
        if rng.random() < 0.12:
            return self._working(rng)
        (task,) = rng.choices(["addition", "subtraction", "product", "story"], [36, 60, 3, 1])
        answer = TASKS[task](rng, "train").answer
        if task == "product":
            answer = answer.rpartition(", ")[2]  # the last step, where there are several
        head, sign, rest = answer.partition(" =") if task != "story" else ("", "", answer)
        head_ids, rest_ids = self.encode(head + sign), [*self.encode(rest), self.special[END_OF_TEXT]]
        return Row(
            head_ids + rest_ids,
            [0.0] * len(head_ids) + [STORY_WEIGHT if task == "story" else 1.0] * len(rest_ids),
        )

    def _working(self, rng: random.Random) -> Row:
        """Two small products that do not belong together, and the sum of their results: every step of a working has to
        be computed from what it says, which within one product could be learnt by heart."""
        while True:
            a, b = rng.randint(0, 12), rng.randint(0, 12)
            left, right = rng.choice([1, 2, 3, 4, 5, 10]), rng.choice([1, 2, 3, 4, 5, 10])
            splits = product_split(a, left), product_split(b, right), sum_split(a * left, b * right)
            if a != b and set(splits) == {"train"}:
                break
        row = Row([], [])
        steps = {f"{a} * {left} =": a * left, f", {b} * {right} =": b * right}
        for step, result in {**steps, f", {a * left} + {b * right} =": a * left + b * right}.items():
            step_ids, result_ids = self.encode(step), self.encode(f" {result}")
            row.ids += step_ids + result_ids
            row.weights += [0.0] * len(step_ids) + [1.0] * len(result_ids)
        return row

    def _weights(self, body: list[int], weight: float) -> list[float]:
        """The same weight for all tokens, but more for the result of a sum."""
        result = body.index(self._equals) + 1 if self._equals in body else len(body)
        return [weight] * result + [weight * RESULT_WEIGHT] * (len(body) - result)

    def training_rows(self, rng: random.Random) -> Iterator[Row]:
        """Endless training rows: plain sums, single exchanges, recalls, conversations, and few but long ones. Plain
        sums are half of the rows but a seventh of the tokens, and the cheapest way to see many: in a conversation a sum
        takes 40 tokens, here 15. What is learnt slowest gets exchanges of its own. Long rows are a fifth of the tokens.
        """
        tasks, weights = list(_SINGLE), list(_SINGLE.values())
        while True:
            draw = rng.random()
            if draw < 0.54:
                yield self.plain_row(rng)
            elif draw < 0.84:
                (task,) = rng.choices(tasks, weights)
                yield self.row(as_chat(TASKS[task](rng, "train")))
            elif draw < 0.845:
                yield self.row(long_chat(rng, num_turns=rng.randint(30, 60)))
            elif draw < 0.9:
                yield self.row(recall_chat(rng, "train")[0])
            else:
                yield self.row(training_chat(rng))


def training_batches(maker: RowMaker, rng: random.Random, tokens_per_batch: int, device: str) -> Iterator[Batch]:
    """Endless batches in random order. Rows are sorted by length over a pool of many batches: sorting only what one
    step needs left half of all positions to padding."""
    rows = maker.training_rows(rng)
    while True:
        pool: list[Row] = []
        size = 0
        while size < BATCHES_PER_POOL * tokens_per_batch:
            pool.append(next(rows))
            size += len(pool[-1].ids)
        parts = batches(pool, maker.special[PAD], tokens_per_batch, device)
        rng.shuffle(parts)
        yield from parts


def batches(rows: list[Row], pad: int, max_tokens: int, device: str) -> list[Batch]:
    """The rows, sorted by length, in batches of at most `max_tokens` padded positions (or one row)."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    groups: list[list[Row]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row.ids) > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return [_batch(group, pad, device) for group in groups]


def _batch(rows: list[Row], pad: int, device: str) -> Batch:
    length = max(len(row.ids) for row in rows)
    tokens_BT = torch.tensor([row.ids + [pad] * (length - len(row.ids)) for row in rows])
    weights_BT = torch.tensor([row.weights + [0.0] * (length - len(row.ids)) for row in rows])
    targets_BT, next_weights_BT = tokens_BT.roll(-1, 1), weights_BT.roll(-1, 1)
    next_weights_BT[:, -1] = 0.0
    positions_S = next_weights_BT.flatten().nonzero().squeeze(1)
    return Batch(
        tokens_BT.to(device),
        positions_S.to(device),
        targets_BT.flatten()[positions_S].to(device),
        next_weights_BT.flatten()[positions_S].to(device),
    )
