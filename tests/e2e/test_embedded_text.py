"""The embedded model, as committed, is right: held-out questions asked over HTTP, greedily, many at once.

Operands, word lists and names of these cases were never trained on (`tests/models/test_embedded_*` prove the split).
Cases are fixed by their seed and answers are greedy, so the committed weights pass or fail for good.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest
from serving import serving

from models.embedded.cases import held_out_cases, is_correct
from models.embedded.paths import EMBEDDED

NUM_CASES = 200
FLOORS = {
    "addition": 0.98,
    "subtraction": 0.98,
    "product": 0.98,
    "copying": 0.98,
    "recall": 0.97,
    "comparison": 0.97,
    "counting": 0.97,
    "too_large": 0.98,
}
DISTANT_CASES, DISTANT_FLOOR = 40, 0.9
"""Fewer, since each has a prompt of about 2000 tokens."""


@pytest.fixture(scope="module")
def url():
    if not (Path(EMBEDDED["tandem-text"]) / "model.safetensors").exists():
        pytest.skip("the embedded model is not here")
    with serving("tandem-text", "--no-ray", "--threads", "1") as server:
        yield server.url


async def accuracy(url: str, task: str, n: int = NUM_CASES) -> float:
    cases = held_out_cases(task, n)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def ask(case) -> bool:
            answer = await client.chat.completions.create(
                model="tandem-text", messages=case.messages, temperature=0, max_tokens=200
            )
            return is_correct(answer.choices[0].message.content or "", case)

        right = await asyncio.gather(*(ask(case) for case in cases))
    return sum(right) / len(right)


@pytest.mark.parametrize("task", sorted(FLOORS))
def test_held_out_accuracy(url, task):
    assert asyncio.run(accuracy(url, task)) >= FLOORS[task]


def test_a_name_is_recalled_over_two_thousand_tokens(url):
    assert asyncio.run(accuracy(url, "distant_recall", DISTANT_CASES)) >= DISTANT_FLOOR


def test_the_first_minute_of_a_new_user(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    said: list[dict[str, str]] = []

    def say(text: str) -> str:
        said.append({"role": "user", "content": text})
        answer = client.chat.completions.create(model="tandem-text", messages=said, temperature=0)
        said.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        return said[-1]["content"]

    assert say("Hello!")
    assert "42" in say("What is 12 + 30?")
    say("My name is Ada.")
    assert "7" in say("What is 9 - 2?")
    assert "Ada" in say("What is my name?")
