"""A replica: its model over the channel, its place at the hub, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backend import FakeBackend, request
from prometheus_client.parser import text_string_to_metric_families
from tiny import tiny_folder
from tiny_pipelines import save, sd3_pipeline

from serve import replica as replica_module
from serve.channel import ChannelClient
from serve.errors import ConfigError, Draining, EngineDead
from serve.events import Finished, ImagePreview, ImageReady, TokenDelta
from serve.hub import Hub
from serve.options import ModelOptions
from serve.replica import Replica, Served
from serve.request import ImageRequest, SamplingParams, TextRequest
from serve.wire import ReplicaEntry

SECRET = b"s" * 32
ROOT = Path(__file__).resolve().parent.parent.parent


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


@contextlib.asynccontextmanager
async def started(
    folder: Path, options: ModelOptions | None = None, **collaborators: Any
) -> AsyncIterator[tuple[Replica, Hub, ChannelClient]]:
    hub = Hub(SECRET)
    hub_address = await hub.start(f"unix:{folder}/hub")
    replica = Replica(
        options or ModelOptions(model="fake"), replica_id="replica-0", secret=SECRET, hub_address=hub_address,
        address=f"unix:{folder}/replica", **collaborators,
    )  # fmt: skip
    try:
        await replica.start()
        (entry,) = hub.entries()
        client = await ChannelClient.connect(entry.address, secret=SECRET, gateway_id="gateway-0")
        try:
            yield replica, hub, client
        finally:
            await client.aclose()
            await replica.aclose()
    finally:
        await hub.aclose()


def fake(backend: FakeBackend) -> Callable[..., Served]:
    return lambda options, observer, on_death: Served(backend, {"tokenizer.json": b"{}"})


def by_label(text: str) -> dict[tuple[str, str], float]:
    """Sample name and the value of the label that tells its series apart → value."""
    return {
        (sample.name, next(filter(None, map(sample.labels.get, ("stage", "reason", "kind"))), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def samples(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {s.name: s.value for family in families for s in family.samples if s.labels["process"] == "replica-0"}


def test_a_replica_is_registered_with_what_it_serves_and_leaves_when_it_closes(tmp_path):
    async def test() -> None:
        backend = FakeBackend(period_s=0)
        async with started(tmp_path, build=fake(backend)) as (replica, hub, client):
            assert hub.entries() == [ReplicaEntry("replica-0", "fake", "text", f"unix:{tmp_path}/replica")]
            assert client.card == replica.card == backend.card and client.bundle == {"tokenizer.json": b"{}"}
            await replica.aclose()
            assert hub.entries() == []

    run(test)


def test_a_replica_that_loads_is_announced_and_one_that_fails_to_leaves(tmp_path):
    may_load = threading.Event()

    def build(options: ModelOptions, observer: Any, on_death: Any) -> Served:
        may_load.wait(10)
        raise ConfigError("weights are missing")

    async def test() -> None:
        hub = Hub(SECRET)
        address = await hub.start(f"unix:{tmp_path}/hub")
        replica = Replica(
            ModelOptions(model="fake"), replica_id="replica-0", secret=SECRET, hub_address=address,
            address=f"unix:{tmp_path}/replica", build=build,
        )  # fmt: skip
        starting = asyncio.create_task(replica.start())
        while not hub.entries():
            await asyncio.sleep(0.001)
        assert hub.entries() == [ReplicaEntry("replica-0", "fake", "", "")]
        may_load.set()
        with pytest.raises(ConfigError, match="missing"):
            await starting
        while hub.entries():
            await asyncio.sleep(0.001)
        await hub.aclose()

    run(test)


def test_a_draining_replica_lets_its_streams_end(tmp_path):
    async def test() -> None:
        backend = FakeBackend()
        async with started(tmp_path, build=fake(backend)) as (replica, _, client):
            stream = await client.submit(request())
            draining = asyncio.create_task(replica.drain(10))
            backend.streams[0].put(TokenDelta(0, (1,)))
            backend.streams[0].end()
            assert [events async for events in stream] == [[TokenDelta(0, (1,))]]
            await draining

    run(test)


@pytest.mark.parametrize("how", ["says so", "hangs"])
def test_a_dead_engine_ends_its_process_after_its_streams_have_their_error(tmp_path, monkeypatch, how):
    monkeypatch.setattr(replica_module, "WATCH_PERIOD_S", 0.01)
    monkeypatch.setattr(replica_module, "LAST_WORDS_S", 0.1)

    async def test() -> None:
        backend, deaths, statuses, ended = FakeBackend(), [], [], threading.Event()

        def build(options: ModelOptions, observer: Any, on_death: Callable[[BaseException], None]) -> Served:
            deaths.append(on_death)
            return Served(backend, {})

        def exit(status: int) -> None:
            statuses.append(status)
            ended.set()

        async def sick() -> None:
            raise EngineDead("a step hangs")

        async with started(tmp_path, build=build, exit=exit) as (_, _, client):
            stream = await client.submit(request())
            backend.streams[0].end(EngineDead("the engine has died"))
            if how == "hangs":
                monkeypatch.setattr(backend, "check_health", sick)
            else:
                await asyncio.to_thread(deaths[0], RuntimeError("CUDA error"))
            with pytest.raises(EngineDead):
                await anext(stream)
            assert await asyncio.to_thread(ended.wait, 5)
            assert statuses == [replica_module.EXIT_STATUS]

    run(test)


def test_an_orderly_end_is_no_death(tmp_path):
    async def test() -> None:
        deaths: list[Callable[[BaseException], None]] = []
        statuses: list[int] = []

        def build(options: ModelOptions, observer: Any, on_death: Callable[[BaseException], None]) -> Served:
            deaths.append(on_death)
            return Served(FakeBackend(), {})

        async with started(tmp_path, build=build, exit=statuses.append) as (replica, _, _):
            await replica.aclose()
            deaths[0](RuntimeError("the engine's thread ends"))
        assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()) and statuses == []

    run(test)


def test_a_text_model_is_built_served_and_measured(tmp_path):
    torch.set_num_threads(1)
    model = str(tiny_folder(tmp_path))
    options = ModelOptions(
        model=model, served_model_name=("tiny",), device="cpu", threads=1, kv_cache_memory_bytes=1 << 20
    )

    async def test() -> None:
        async with started(tmp_path, options) as (_, hub, client):
            assert client.card.name == "tiny" and "tokenizer.json" in client.bundle
            sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
            asked = TextRequest(request_id="r", model="tiny", prompt_token_ids=tuple(range(3, 40)), sampling=sampling)
            for _ in range(2):
                stream = await client.submit(asked)
                events = [event async for events in stream for event in events]
                assert sum(len(event.token_ids) for event in events if isinstance(event, TokenDelta)) == 6
            assert isinstance(events[-1], Finished) and events[-1].usage.cached_tokens == 32
            found: dict[str, float] = {}
            while found.get("tandem_jobs_total") is None or found["tandem_request_queue_time_seconds_count"] < 2:
                await asyncio.sleep(0.05)
                found = samples(hub.render())
            assert found["tandem_prefix_cache_queries_tokens_total"] >= 74
            assert found["tandem_prefix_cache_hits_tokens_total"] == 32
            assert found["tandem_kv_cache_blocks"] > 0 and found["tandem_kv_cache_usage_ratio"] == 0
            assert found["tandem_model_info"] == 1 and found["tandem_requests_running"] == 0
            assert found["tandem_step_tokens_sum"] >= 37 + 5 + 5 + 5

    run(test)


def test_an_image_model_is_built_served_and_measured(tmp_path):
    torch.set_num_threads(1)
    model = str(save(sd3_pipeline(has_t5=False), tmp_path / "model"))
    options = ModelOptions(model=model, served_model_name=("tiny",), device="cpu", threads=1)

    async def test() -> None:
        async with started(tmp_path, options) as (_, hub, client):
            limits = client.card.image
            assert client.card.kind == "image" and limits is not None and client.bundle == {}
            asked = ImageRequest(
                request_id="r", model="tiny", prompt="a cat", width=32, height=32, num_inference_steps=4,
                guidance_scale=3.0, solver=limits.solvers[0], seed=1, num_previews=1, n=2,
            )  # fmt: skip
            events = [event async for events in await client.submit(asked) for event in events]
            for kind, number in ((ImagePreview, 2), (ImageReady, 2), (Finished, 2)):
                assert sum(isinstance(event, kind) for event in events) == number
            found: dict[tuple[str, str], float] = {}
            while found.get(("tandem_jobs_total", "stop")) != 2:
                await asyncio.sleep(0.05)
                found = by_label(hub.render())
            assert found["tandem_image_step_rows_sum", "denoise"] == 2 * 2 * 4
            assert found["tandem_image_step_tokens_sum", "decode"] == 2 * 2 * 64
            assert found["tandem_image_step_seconds_count", "encode"] == 1
            assert found["tandem_model_info", "image"] == 1

    run(test)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ModelOptions(model="/nowhere/at/all"), "/nowhere/at/all"),
        (ModelOptions(model="tiny", kind="image", max_num_seqs=9), "max_num_seqs is an option of text models"),
        (ModelOptions(model="tiny", kind="image", chat_template="x"), "chat_template is an option of text models"),
        (
            ModelOptions(model="tiny", kind="text", max_inference_steps=9),
            "max_inference_steps is an option of image models",
        ),
        (
            ModelOptions(model="tiny", kind="image"),
            "model_index.json",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_clear_sentence(tmp_path, monkeypatch, options, words):
    if options.kind is not None:
        monkeypatch.setattr("serve.model_folder.resolve", lambda *args, **kwargs: tmp_path)

    async def test() -> None:
        with pytest.raises(ConfigError) as raised:
            async with started(tmp_path, options):
                pass
        assert words in raised.value.message

    run(test)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", '{"a":', "tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "?"}}', "tokenizer.json"),
        ("chat_template.jinja", "{% if %}", "the chat template is not valid jinja2"),
    ],
)
def test_files_no_gateway_could_read_end_the_start(tmp_path, file, content, words):
    """Else the replica would be up, and no gateway able to serve it."""
    folder = tiny_folder(tmp_path)
    (folder / file).write_text(content)

    async def test() -> None:
        with pytest.raises(ConfigError, match=words):
            async with started(tmp_path, ModelOptions(model=str(folder))):
                pass

    run(test)


def test_the_module_itself_loads_no_torch():
    code = "import sys, serve.replica; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_streams_left_at_the_end_are_told(tmp_path):
    async def test() -> None:
        async with started(tmp_path, build=fake(FakeBackend())) as (replica, _, client):
            stream = await client.submit(request())
            await replica.aclose()
            with pytest.raises(Draining):
                await anext(stream)

    run(test)
