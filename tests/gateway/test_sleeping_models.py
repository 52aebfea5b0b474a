"""A model that scales to zero, as clients see it: it is listed, it answers late, or says when to come again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from gateway_fakes import FakeBackend, FakeGateway, call, card, entry, fake_gateway

from serve.gateway.hold import Hold, Sleeper

PATH = "/v1/chat/completions"
BODY = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@contextlib.asynccontextmanager
async def asleep(*, num_wakes: int = 9, timeout_s: float = 60.0) -> AsyncIterator[FakeGateway]:
    """A gateway whose only model has never had a replica, and gets one when it is woken, so many times."""
    backend = FakeBackend(card=card(aliases=("small",), load_s=40.0))

    async def wake(model: str) -> None:
        nonlocal num_wakes
        num_wakes -= 1
        if num_wakes >= 0:
            gateway.pool.update([entry(backend.replica_id, model)])
        await asyncio.Event().wait()

    hold = Hold([Sleeper("tiny", ("small",))], wake, timeout_s=timeout_s)
    async with fake_gateway(backend, hold=hold) as gateway:
        yield gateway
        hold.close()


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_it_is_listed_and_ready_before_any_replica_has_told_of_it():
    async def scenario():
        async with asleep() as gateway:
            listed = (await call(gateway, "/v1/models")).json()["data"]
            assert [(model["id"], model["root"]) for model in listed] == [("tiny", "tiny"), ("small", "tiny")]
            assert (await call(gateway, "/v1/models/small")).json()["root"] == "tiny"
            assert (await call(gateway, "/readyz")).status == 200

    run(scenario)


def test_the_first_request_wakes_it_and_is_answered():
    async def scenario():
        async with asleep() as gateway:
            reply = await call(gateway, PATH, BODY)
            assert reply.status == 200 and reply.json()["usage"]["completion_tokens"] == 2
            listed = (await call(gateway, "/v1/models")).json()["data"]
            assert [model["kind"] for model in listed] == ["text", "text"]

    run(scenario)


def test_a_known_model_refuses_what_is_wrong_at_once_and_waits_with_the_rest():
    async def scenario():
        async with asleep() as gateway:
            await call(gateway, PATH, BODY)
            gateway.pool.update([])
            assert (await call(gateway, PATH, BODY | {"temperature": 9})).status == 400
            assert gateway.pool.hold.num_held("tiny") == 0
            assert (await call(gateway, PATH, BODY)).status == 200

    run(scenario)


def test_one_that_does_not_come_is_unavailable_with_a_time_to_come_again():
    async def scenario():
        async with asleep(num_wakes=0, timeout_s=0.01) as gateway:
            reply = await call(gateway, PATH, BODY)
            assert reply.status == 503 and reply.json()["error"]["code"] == "unavailable"
            assert int(reply.headers["retry-after"]) >= 1

    run(scenario)


def test_unknown_names_wake_nobody():
    async def scenario():
        async with asleep() as gateway:
            await call(gateway, PATH, BODY)
            gateway.pool.update([])
            assert (await call(gateway, PATH, BODY | {"model": "other"})).status == 404
            assert gateway.pool.hold.num_held("tiny") == 0

    run(scenario)


def test_one_that_does_not_come_again_says_how_long_loading_takes():
    async def scenario():
        async with asleep(num_wakes=1) as gateway:
            assert (await call(gateway, PATH, BODY)).status == 200
            gateway.pool.update([])
            reply = await call(gateway, PATH, BODY | {"timeout": 0.05})
            assert reply.status == 503 and 40 <= int(reply.headers["retry-after"]) <= 51
            gateway.pool.update([entry("another", "tiny", address="")])
            reply = await call(gateway, PATH, BODY | {"timeout": 0.05})
            assert reply.status == 503 and 38 <= int(reply.headers["retry-after"]) <= 51

    run(scenario)
