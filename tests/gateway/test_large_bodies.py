"""A body may be larger than a head may be, also when both arrive at once."""

from __future__ import annotations

import asyncio
import json

import pytest
from gateway_fakes import fake_gateway

from serve.gateway.server import GatewayServer
from serve.options import GatewayOptions

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.mark.parametrize("is_split", [False, True])
def test_a_body_that_comes_in_one_piece_is_not_taken_for_a_head(is_split):
    async def scenario() -> bytes:
        async with fake_gateway() as gateway:
            server = GatewayServer(gateway.app, GatewayOptions(port=0), gateway.drain)
            _, port = await server.start()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 4, "user": "u"}).encode()
            body += b" " * (40_000 - len(body))
            head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
            for part in (head, body) if is_split else (head + body,):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.05 if is_split else 0)  # two pieces are to arrive as two
            answer = await reader.read()
            writer.close()
            await server.aclose()
            return answer

    answer = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
