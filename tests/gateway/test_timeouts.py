"""How long a request may take: the body's word, else the header's, at most the server's."""

from __future__ import annotations

import asyncio

import pytest
from gateway_fakes import FakeBackend, call, fake_gateway
from gateway_image_fakes import FakeImageBackend

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/images/generations": {"prompt": "a red circle"},
}


def ask(path, header: str | None, *, options=None, **fields):
    """The status, and the timeout that reached the replica."""

    async def scenario():
        text, image = FakeBackend(), FakeImageBackend()
        async with fake_gateway(text, image, **(options or {})) as gateway:
            headers = {} if header is None else {"x-request-timeout": header}
            reply = await call(gateway, path, {**BODIES[path], **fields}, headers=headers)
            return reply, [request.timeout_s for request in (*text.requests, *image.requests)]

    return asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("header", "body", "expected"),
    [(None, None, 600), ("7", None, 7), ("2.5", None, 2.5), ("7", 3, 3), ("1000", None, 600), (None, 1000, 600)],
)
def test_body_wins_over_header_and_the_server_over_both(path, header, body, expected):
    reply, [timeout_s] = ask(path, header, timeout=body)
    assert reply.status == 200 and timeout_s == expected


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("header", ["0", "0.0", "-1", "1e3", "nan", "inf", "\xb2", "1_0", "5s", "86401", "1" * 99])
def test_header_that_is_no_time_is_refused(path, header):
    reply, timeouts = ask(path, header)
    assert reply.status == 400 and reply.json()["error"]["param"] == "x-request-timeout" and timeouts == []


def test_request_that_takes_longer_ends_with_504(monkeypatch):
    from serve.gateway import exchange

    monkeypatch.setattr(exchange, "GRACE_S", 0.05)

    async def scenario():
        async with fake_gateway(FakeImageBackend(gate=asyncio.Event())) as gateway:
            path = "/v1/images/generations"
            reply = await call(gateway, path, BODIES[path], headers={"x-request-timeout": "0.05"})
            assert reply.status == 504 and reply.json()["error"]["code"] == "deadline_exceeded"
            assert not gateway.backend.open

    asyncio.run(asyncio.wait_for(scenario(), 30))
