"""Paced replicas behind a real pool and channel: prefixes are found where they are, and images all come back."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from loadtest.paced import ImageDevice, TextDevice, image_replica, text_replica
from loadtest.routing import RULES, Seen, _answer, gateway, images, row
from serve.gateway.routing import Router
from serve.request import SamplingParams, TextRequest

TEXT = TextDevice(base_s=0.0005, row_s=0.0, unit_s=1e-6, kv_cache_tokens=8192)
IMAGE = ImageDevice(base_s=0.0001, token_s=1e-8)


def request(prompt) -> TextRequest:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    return TextRequest(
        request_id=secrets.token_hex(8), model="paced", prompt_token_ids=tuple(prompt), sampling=sampling
    )


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_prompt_finds_the_replica_that_has_told_of_its_prefix():
    async def scenario():
        router, seen = Router(), Seen()
        async with gateway(router, lambda: text_replica(TEXT)) as pool:
            await _answer(pool, seen, request(range(2, 802)))
            assert seen.num_cached == 0
            views = [member.remote.prefixes for member in pool._members.values()]
            while sum(len(view.keys) for view in views) < 50:
                await asyncio.sleep(0.01)
            router._promises.clear()
            for number in range(4):
                await _answer(pool, seen, request([*range(2, 802), 9 + number]))
            assert seen.num_cached == 4 * 800
            assert sorted(len(view.keys) for view in views)[:3] == [0, 0, 0]

    run(scenario)


@pytest.mark.parametrize("rule", RULES)
def test_every_image_comes_back_under_every_rule(rule):
    async def scenario():
        async with gateway(RULES[rule](), lambda: (image_replica(IMAGE), None)) as pool:
            figures = row(await images(pool, seed=0, seconds=0.5, load=0.8))
        assert figures["requests"] > 1 and figures["latency_s_p99"] >= figures["latency_s_p50"] > 0

    run(scenario)
