"""Replicas come, refuse, get lost and go; requests find one as long as there is one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from gateway_fakes import FakeBackend, card, entry, joined
from gateway_image_fakes import FakeImageBackend

from serve.errors import Draining, EngineDead, InvalidRequest, ModelNotFound, Overloaded, ReplicaLost, Unavailable
from serve.gateway.pool import Pool
from serve.gateway.shortlist import NUM_DRAWN
from serve.request import ImageRequest, SamplingParams, TextRequest


def request(prompt=range(200), salt="") -> TextRequest:
    sampling = SamplingParams(max_tokens=4)
    return TextRequest(request_id="r", model="tiny", prompt_token_ids=tuple(prompt), sampling=sampling, cache_salt=salt)


def image_request() -> ImageRequest:
    return ImageRequest(
        request_id="r", model="painter", prompt="x", width=64, height=64, num_inference_steps=2, guidance_scale=1.0,
        solver="flow_match_euler", seed=1,
    )  # fmt: skip


class Net:
    """Connects to fakes; can lose them."""

    def __init__(self, *backends: FakeBackend) -> None:
        self.backends = {backend.replica_id: backend for backend in backends}
        self.on_lost: dict[str, object] = {}
        self.num_refused = 0
        self.num_calls = 0

    async def connect(self, named, on_lost):
        self.num_calls += 1
        if self.num_refused:
            self.num_refused -= 1
            raise ReplicaLost("not yet")
        self.on_lost[named.replica_id] = on_lost
        return self.backends[named.replica_id]


def with_pool(*backends: FakeBackend):
    """Run a test's coroutine with a pool over `backends`."""

    def decorate(scenario):
        async def run():
            net = Net(*backends)
            pool = Pool(net.connect)
            pool.update([entry(each.replica_id, each.card.name, kind=each.card.kind) for each in backends])
            await joined(pool, len(backends))
            try:
                await scenario(pool, net)
            finally:
                await pool.aclose()

        asyncio.run(asyncio.wait_for(run(), 30))

    return decorate


async def read(stream) -> int:
    return sum([1 async for _ in stream])


@pytest.mark.parametrize(
    "refusal", [Overloaded("full", retry_after_s=1), Draining("x"), ReplicaLost("x"), EngineDead("x")]
)
def test_next_replica_is_tried_when_one_refuses_for_now(refusal):
    a, b = FakeBackend(replica_id="a", refusal=refusal), FakeBackend(replica_id="b")

    @with_pool(a, b)
    async def _(pool, net):
        for _ in range(4):
            assert await read(await pool.submit(request())) > 0
        assert len(b.requests) == 4


def test_invalid_request_is_not_tried_elsewhere():
    a, b = (FakeBackend(replica_id=name, refusal=InvalidRequest("no")) for name in "ab")

    @with_pool(a, b)
    async def _(pool, net):
        with pytest.raises(InvalidRequest):
            await pool.submit(request())
        assert len(a.requests) + len(b.requests) == 1


def test_when_all_are_full_the_soonest_retry_time_is_told():
    a = FakeBackend(replica_id="a", refusal=Overloaded("full", retry_after_s=9))
    b = FakeBackend(replica_id="b", refusal=Overloaded("full", retry_after_s=3))

    @with_pool(a, b)
    async def _(pool, net):
        with pytest.raises(Overloaded) as refused:
            await pool.submit(request())
        assert refused.value.retry_after_s == pytest.approx(3, abs=0.01)


def test_unknown_model_names_those_that_are_served():
    @with_pool(FakeBackend())
    async def _(pool, net):
        with pytest.raises(ModelNotFound, match="'tiny'"):
            pool.models.find("other")
        assert pool.models.find("small").name == "tiny" and pool.models.find(None).name == "tiny"


def test_model_without_a_name_must_be_the_only_one():
    @with_pool(FakeBackend(replica_id="a"), FakeBackend(replica_id="b", card=card("second", aliases=())))
    async def _(pool, net):
        with pytest.raises(InvalidRequest, match="second"):
            pool.models.find(None)


def test_model_without_a_name_must_be_the_only_one_of_its_kind():
    @with_pool(FakeBackend(), FakeImageBackend())
    async def _(pool, net):
        assert pool.models.find(None, "text").name == "tiny" and pool.models.find(None, "image").name == "painter"
        with pytest.raises(InvalidRequest, match="'painter', 'tiny'"):
            pool.models.find(None)


def test_model_of_the_other_kind_is_refused_with_those_that_fit():
    @with_pool(FakeBackend(), FakeImageBackend())
    async def _(pool, net):
        for name, kind, fits in (("painter", "text", "'tiny'"), ("small", "image", "'painter'")):
            with pytest.raises(InvalidRequest, match=fits) as refused:
                pool.models.find(name, kind)
            assert refused.value.param == "model"


def test_kind_that_is_not_served_is_told_from_one_that_is_not_ready():
    @with_pool(FakeBackend())
    async def _(pool, net):
        with pytest.raises(ModelNotFound):
            pool.models.find(None, "image")
        net.num_refused = 1
        pool.update([entry("replica-0"), entry("b", "painter", kind="image")])
        for name in (None, "painter"):
            with pytest.raises(Unavailable):
                pool.models.find(name, "image")


def test_images_are_placed_and_read_like_text():
    full = FakeImageBackend(replica_id="a", refusal=Overloaded("full", retry_after_s=1))

    @with_pool(full, FakeImageBackend(replica_id="b"))
    async def _(pool, net):
        for _ in range(6):
            assert await read(await pool.submit(image_request())) == 3
        assert pool._router._promises == {}, "images leave no prefix behind"


def test_what_would_wait_too_long_everywhere_is_refused_and_told_to_the_least_busy():
    busy, busier = FakeBackend(replica_id="a", backlog_s=20.0), FakeBackend(replica_id="b", backlog_s=30.0)

    @with_pool(busy, busier)
    async def _(pool, net):
        short = replace(request(), timeout_s=5.0)
        with pytest.raises(Overloaded) as caught:
            await pool.submit(short)
        assert caught.value.retry_after_s == pytest.approx(15.0, abs=0.01)
        assert busy.turned_away == [1.0] and busier.turned_away == [] and not busy.requests
        pool.update([entry("a"), entry("b"), entry("c", address="")])  # one more loads
        with pytest.raises(Overloaded) as caught:
            await pool.submit(short)
        assert caught.value.retry_after_s <= busy.card.load_s
        await pool.submit(replace(request(), timeout_s=25.0))
        assert len(busy.requests) == 1


def test_of_many_busy_replicas_the_one_with_room_is_found_before_a_request_is_refused():
    busy = [FakeBackend(replica_id=f"r{number}", backlog_s=20.0) for number in range(3 * NUM_DRAWN)]
    idle = FakeBackend(replica_id="idle", backlog_s=0.0)

    @with_pool(*busy, idle)
    async def _(pool, net):
        for number in range(4):
            await pool.submit(replace(request(), request_id=f"{number}", timeout_s=5.0))
        assert len(idle.requests) == 4
        idle.backlog_s = 30.0
        with pytest.raises(Overloaded, match="about 20 s") as caught:
            await pool.submit(replace(request(), request_id="late", timeout_s=5.0))
        assert caught.value.retry_after_s == pytest.approx(15.0, abs=0.01)
        assert [backend.turned_away for backend in busy if backend.turned_away] == [[1.0]]
        assert not any(backend.requests for backend in busy)


def test_a_draining_replica_does_not_count_as_room():
    going, busy = FakeBackend(replica_id="a", is_draining=True), FakeBackend(replica_id="b", backlog_s=30.0)

    @with_pool(going, busy)
    async def _(pool, net):
        with pytest.raises(Overloaded):
            await pool.submit(replace(request(), timeout_s=5.0))
        assert busy.turned_away == [1.0]


def test_a_full_queue_counts_as_asked_for():
    full = FakeBackend(refusal=Overloaded("full", retry_after_s=3.0))

    @with_pool(full)
    async def _(pool, net):
        with pytest.raises(Overloaded):
            await pool.submit(request())
        assert full.turned_away == [1.0]


def test_model_whose_replicas_are_gone_is_unavailable_not_unknown():
    @with_pool(FakeBackend())
    async def _(pool, net):
        pool.update([])
        assert pool.models.find("tiny").name == "tiny" and not pool.is_ready
        with pytest.raises(Unavailable):
            await pool.submit(request())


def test_before_any_replica_every_model_is_unavailable():
    async def scenario():
        pool = Pool(Net().connect)
        for name in ("x", None):
            with pytest.raises(Unavailable):
                pool.models.find(name)

    asyncio.run(scenario())


def test_meeting_ends_when_every_model_can_be_served():
    a, b = FakeBackend(replica_id="a"), FakeBackend(replica_id="b", card=card("second", aliases=()))

    async def scenario():
        pool = Pool(Net(a, b).connect)
        pool.update([entry("a")])
        await pool.meet(["tiny"])
        both = asyncio.create_task(pool.meet(["tiny", "second"]))
        await joined(pool, 1)
        assert not both.done()
        pool.update([entry("a"), entry("b", "second")])
        await both
        await pool.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_lost_replica_is_reached_again_while_the_hub_names_it(monkeypatch):
    monkeypatch.setattr("serve.gateway.pool.FIRST_RETRY_S", 0.001)
    backend = FakeBackend()

    @with_pool(backend)
    async def _(pool, net):
        net.num_refused = 2
        net.on_lost["replica-0"]()
        assert not pool.is_ready
        await joined(pool, 1)
        assert pool.is_ready and net.num_calls == 4
        assert await read(await pool.submit(request())) > 0


def test_dropped_replica_finishes_its_streams_and_gets_nothing_new():
    backend = FakeBackend()

    @with_pool(backend)
    async def _(pool, net):
        stream = await pool.submit(request())
        pool.update([])
        assert backend.num_closed == 0
        assert await read(stream) > 0
        await stream.aclose()
        await asyncio.sleep(0)
        assert backend.num_closed == 1


def test_retired_replica_finishes_its_streams_and_gets_nothing_new():
    a, b = FakeBackend(replica_id="a"), FakeBackend(replica_id="b")

    @with_pool(a, b)
    async def _(pool, net):
        stream = await pool.submit(request())
        used, other = (a, b) if a.requests else (b, a)
        pool.retire([used.replica_id, "one that was never met"])
        for _ in range(4):
            assert await read(await pool.submit(request())) > 0
        assert (len(used.requests), len(other.requests)) == (1, 4)
        assert await read(stream) > 0


def test_closing_a_stream_twice_counts_once():
    backend = FakeBackend()

    @with_pool(backend)
    async def _(pool, net):
        stream = await pool.submit(request())
        await stream.aclose()
        await stream.aclose()
        assert backend.num_cancelled == 1 and not pool._members["replica-0"].open


def test_requests_go_to_replicas_whose_tokenizer_has_read_them_while_there_are_any():
    old, new = FakeBackend(replica_id="old"), FakeBackend(replica_id="new", chat_template="{{ messages }}")

    async def run() -> None:
        net = Net(old, new)
        pool = Pool(net.connect)
        pool.update([entry("old")])
        await joined(pool, 1)
        pool.update([entry("old"), entry("new")])
        await joined(pool, 2)
        for _ in range(3):
            await read(await pool.submit(request()))
        assert len(new.requests) == 3 and not old.requests
        pool.update([entry("old")])
        await read(await pool.submit(request()))
        assert old.requests
        await pool.aclose()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_loading_replica_is_waited_for_by_name_and_not_connected_to():
    async def run() -> None:
        net = Net(FakeBackend(replica_id="a"))
        pool = Pool(net.connect)
        pool.update([entry("a", address="", kind="")])
        assert not pool.is_ready and net.num_calls == 0
        with pytest.raises(Unavailable):
            pool.models.find("tiny", "text")
        pool.update([entry("a")])
        await joined(pool, 1)
        assert pool.is_ready
        pool.retire(["a"])
        assert not pool.is_ready
        await pool.aclose()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_the_census_tells_which_models_go_forward_and_what_is_on_its_way():
    async def run() -> None:
        net = Net(FakeBackend(replica_id="a"), FakeBackend(replica_id="b"))
        pool = Pool(net.connect, configured=["tiny", "absent"])
        pool.update([entry("a"), entry("b"), entry("c", address="", kind="")])
        await joined(pool, 2)
        pool.retire(["b"])
        census = pool.census()
        assert {name: (each.ready, each.draining, each.loading) for name, each in census.items()} == {
            "tiny": (1, 1, 1), "absent": (0, 0, 0)
        }  # fmt: skip
        await pool.aclose()

    asyncio.run(asyncio.wait_for(run(), 30))
