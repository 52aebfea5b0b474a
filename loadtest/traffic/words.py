"""Prompts of a wanted number of tokens, and what counts tokens: a tokenizer file, the server, or nobody.

Prompts are common words behind each other. What a word adds to a prompt is measured once for each word, so a prompt is
made by adding up; it misses its length by at most a word's tokens. The server's usage tells what it came to.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line
end member law car city name team minute idea body back parent face level office door health person art war history
party result change morning reason research girl guy moment air teacher force education
""".split()  # noqa: SIM905 (a list of a hundred strings reads worse)

Counter = Callable[[str], Awaitable[int]]
"""Tokens of a text, without special tokens."""


@dataclass(frozen=True, slots=True)
class Words:
    """Words with what each adds to a prompt, in tokens."""

    costs: tuple[tuple[str, int], ...]
    is_measured: bool = True
    """False: nobody could count, so each word stands for a token."""

    @classmethod
    async def measured(cls, count: Counter) -> Words:
        """By counting each behind another word."""
        base = await count("time")
        return cls(tuple([(word, max(1, await count(f"time {word}") - base)) for word in COMMON]))

    @classmethod
    def uncounted(cls) -> Words:
        return cls(tuple((word, 1) for word in COMMON), is_measured=False)

    def prompt(self, num_tokens: int, source: random.Random) -> str:
        """Random words that come to `num_tokens`, or just above."""
        chosen, total = [], 0
        while total < num_tokens:
            word, cost = source.choice(self.costs)
            chosen.append(word)
            total += cost
        return " ".join(chosen)

    def blocks(self, ids: Sequence[int], block_tokens: int, num_tokens: int) -> str:
        """The prompt of a trace that names its blocks: equal ids, equal words, the last block cut to the length."""
        parts = [
            self.prompt(min(block_tokens, num_tokens - start * block_tokens), random.Random(f"block-{number}"))
            for start, number in enumerate(ids)
            if num_tokens > start * block_tokens
        ]
        return " ".join(parts)


def local_counter(folder: str) -> Counter:
    """Counts with the tokenizer.json of a model's folder. Raises ValueError when there is none."""
    encode = local_tokenizer(folder)

    async def count(text: str) -> int:
        return len(encode(text))

    return count


def local_tokenizer(folder: str) -> Callable[[str], list[int]]:
    """From text to ids, without special tokens. Raises ValueError when there is no tokenizer.json."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
    if not file.is_file():
        raise ValueError(f"{folder!r} has no tokenizer.json; give a model's folder or that file")
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
