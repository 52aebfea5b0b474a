"""Two gateways, two replicas and a hub: every scrape tells the same, and tells what clients have counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
from fake_backend import FakeBackend
from gateway_fakes import bundle
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway.gateway import Gateway
from serve.hub import Hub
from serve.options import GatewayOptions, ModelOptions
from serve.replica import Replica, Served

SECRET = b"s" * 32
EXPIRY_S = 3.0


def serving(backend: FakeBackend) -> Callable[..., Served]:
    return lambda options, observer, on_death: Served(backend, bundle())


@contextlib.asynccontextmanager
async def application(folder: Path) -> AsyncIterator[tuple[list[str], list[Gateway], list[FakeBackend]]]:
    """In one process, each part with a connection of its own: (URLs, gateways, backends)."""
    hub = Hub(SECRET, expiry_s=EXPIRY_S)
    async with contextlib.AsyncExitStack() as stack:
        hub_address = await hub.start(f"unix:{folder}/hub")
        stack.push_async_callback(hub.aclose)
        backends = [FakeBackend(period_s=0.001), FakeBackend(period_s=0.001)]
        for number, backend in enumerate(backends):
            replica = Replica(
                ModelOptions(model="fake"),
                replica_id=f"replica-{number}",
                secret=SECRET,
                hub_address=hub_address,
                address=f"unix:{folder}/{number}",
                build=serving(backend),
            )
            await replica.start()
            stack.push_async_callback(replica.aclose)
        gateways, urls = [], []
        for number in range(2):
            options = GatewayOptions(port=0)
            gateway = Gateway(options, gateway_id=f"gateway-{number}", secret=SECRET, hub_address=hub_address)
            urls.append(await gateway.start())
            stack.push_async_callback(gateway.aclose)
            gateways.append(gateway)
        async with httpx.AsyncClient() as client:
            for url in urls:
                while (await client.get(f"{url}/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
        yield urls, gateways, backends


def counters(text: str) -> dict[str, float]:
    """Every value that may never fall: counters, and the counts of histograms."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.endswith(("_total", "_count", "_bucket", "_sum"))
    }


def total(text: str, name: str, **labels: str) -> float:
    """The sum over all processes."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def ask(client: httpx.AsyncClient, url: str, num_tokens: int) -> int:
    """A streamed completion; the number of tokens the client was told of."""
    body = {"model": "fake", "prompt": "hello", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    answer = await client.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200 and "[DONE]" in answer.text, answer.text
    usages = [line for line in answer.text.splitlines() if '"completion_tokens":' in line]
    return int(usages[-1].split('"completion_tokens":')[1].split(",")[0])


def test_scrapes_that_alternate_between_gateways_agree_with_clients_and_never_fall(tmp_path):
    async def test() -> None:
        async with application(tmp_path) as (urls, gateways, backends), httpx.AsyncClient() as client:
            counted, last = 0, {}
            for turn in range(12):
                asked = [ask(client, urls[number % 2], 3 + number) for number in range(4)]
                counted += sum(await asyncio.gather(*asked))
                now = counters((await client.get(f"{urls[turn % 2]}/metrics")).text)
                fallen = {name for name, value in last.items() if now.get(name, 0.0) < value}
                assert not fallen
                last = now
            assert counted == 12 * (3 + 4 + 5 + 6) and all(len(backend.requests) > 5 for backend in backends)
            assert (
                await client.post(f"{urls[0]}/v1/completions", json={"model": "none", "prompt": "x"})
            ).status_code == 404

            await asyncio.sleep(0)
            for url in urls:  # a scrape carries what its own gateway has counted until then
                await client.get(f"{url}/metrics")
            texts = [(await client.get(f"{url}/metrics")).text for url in urls]
            for text in texts:
                assert total(text, "tandem_output_tokens_total") == counted
                assert total(text, "tandem_requests_total", outcome="success", endpoint="completions") == 48
                assert total(text, "tandem_time_to_first_token_seconds_count") == 48
                assert total(text, "tandem_request_output_tokens_sum") == counted
                assert total(text, "tandem_rejections_total", reason="model_not_found") == 1
                assert total(text, "tandem_replicas") == 2

            await gateways[1].aclose()
            died = asyncio.get_running_loop().time()
            text = (await client.get(f"{urls[0]}/metrics")).text
            assert total(text, "tandem_output_tokens_total") == counted
            while total(text, "tandem_process_info", process="gateway-1"):
                await asyncio.sleep(0.2)
                text = (await client.get(f"{urls[0]}/metrics")).text
            assert asyncio.get_running_loop().time() - died < EXPIRY_S + 2
            assert 0 < total(text, "tandem_output_tokens_total") < counted

    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


def test_clients_that_leave_are_counted_and_their_requests_freed(tmp_path):
    async def test() -> None:
        async with application(tmp_path) as (urls, _, backends), httpx.AsyncClient() as client:
            for backend in backends:
                backend.period_s = 0.05
            body = {"model": "fake", "prompt": "hello", "max_tokens": 200, "stream": True, "ignore_eos": True}
            async with client.stream("POST", f"{urls[0]}/v1/completions", json=body) as answer:
                await anext(answer.aiter_bytes())
                assert sum(backend.num_open for backend in backends) == 1
            while sum(backend.num_open for backend in backends):
                await asyncio.sleep(0.01)
            text = ""
            while total(text, "tandem_cancellations_total") != 1:
                text = (await client.get(f"{urls[1]}/metrics")).text
            assert total(text, "tandem_requests_total", outcome="cancelled") == 1

    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())
