"""`tandem serve tandem-text --quantization int8` still knows its sums."""

from __future__ import annotations

import asyncio

import openai
from serving import serving

from models.embedded.cases import held_out_cases, is_correct


async def num_right(url: str, num_cases: int) -> int:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def is_right(case) -> bool:
            answer = await client.chat.completions.create(
                model="tandem-text", messages=case.messages, temperature=0, max_tokens=100
            )
            return is_correct(answer.choices[0].message.content or "", case)

        return sum(await asyncio.gather(*map(is_right, held_out_cases("addition", num_cases))))


def test_sums_are_right_in_int8() -> None:
    with serving("tandem-text", "--no-ray", "--threads", "1", "--quantization", "int8") as server:
        assert asyncio.run(num_right(server.url, 50)) >= 48
