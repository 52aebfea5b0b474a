"""A stream outlives its replica: what the client reads is what it would have read, once, and poison is contained."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
from gateway_fakes import FakeBackend, call, card, entry, fake_gateway, ids, joined
from gateway_image_fakes import FakeImageBackend, image_card

from serve.errors import DeadlineExceeded, Draining, EngineDead, Overloaded, Quarantined, ReplicaLost, Unavailable
from serve.events import DenoiseProgress, Event, Finished, ImagePreview, ImageReady, PromptScored, TokenDelta
from serve.gateway.failover import MAX_LOST
from serve.gateway.pool import Pool
from serve.recorder import Recorder
from serve.request import BeamParams, ImageRequest, SamplingParams, TextRequest

REPLY = ids("the big grey dog and the cat ran")
LOST = ReplicaLost("gone")


@dataclass
class Net:
    """A pool over fakes, one of which is there from the start and gets the request."""

    pool: Pool
    recorder: Recorder
    backends: list[FakeBackend]

    async def join(self) -> None:
        """The others come up."""
        self.pool.update([entry(b.replica_id, b.card.name, kind=b.card.kind) for b in self.backends])
        await joined(self.pool, len(self.backends))

    def count(self, name: str) -> float:
        series = self.recorder.snapshot().series
        return sum(each.values[0] for each in series if each.name == name)


def with_net(*backends: FakeBackend, **options: Any):
    """Run a test's coroutine with a pool that has met the first of `backends`."""

    def decorate(scenario):
        async def run():
            by_id = {backend.replica_id: backend for backend in backends}

            async def connect(named, on_lost):
                return by_id[named.replica_id]

            recorder = Recorder("gateway-0", "gateway")
            net = Net(Pool(connect, recorder=recorder, **options), recorder, list(backends))
            first = backends[0]
            net.pool.update([entry(first.replica_id, first.card.name, kind=first.card.kind)])
            await joined(net.pool, 1)
            try:
                await scenario(net)
            finally:
                await net.pool.aclose()

        asyncio.run(asyncio.wait_for(run(), 30))

    return decorate


def replicas(*losses: tuple[int, Exception] | None, **fields: Any) -> list[FakeBackend]:
    """One a loss: after how many events, and how; then one that goes on to the end."""
    made = [FakeBackend(REPLY, replica_id=f"r{i}", fail_after=loss, **fields) for i, loss in enumerate(losses)]
    return [*made, FakeBackend(REPLY, replica_id="last", **fields)]


def request(n: int = 1, *, prompt_logprobs: int | None = None, timeout_s: float | None = None, **sampling: Any):
    params = SamplingParams(**{"max_tokens": len(REPLY), "seed": 3, **sampling})
    return TextRequest(
        request_id="r", model="tiny", prompt_token_ids=(1, 2, 3), sampling=params, n=n,
        prompt_logprobs=prompt_logprobs, timeout_s=timeout_s,
    )  # fmt: skip


def image_request(n: int = 1, *, num_previews: int = 0) -> ImageRequest:
    return ImageRequest(
        request_id="r", model="painter", prompt="x", width=64, height=64, num_inference_steps=4, guidance_scale=1.0,
        solver="flow_match_euler", seed=1, n=n, num_previews=num_previews,
    )  # fmt: skip


async def read(stream: Any) -> list[Event]:
    return [event async for events in stream for event in events]


async def answer(net: Net, asked: Any) -> list[Event]:
    """Submitted while only the first replica is there; the others join before anything is read."""
    stream = await net.pool.submit(asked)
    await net.join()
    return await read(stream)


def tokens(events: list[Event], index: int = 0) -> list[int]:
    return [t for e in events if isinstance(e, TokenDelta) and e.index == index for t in e.token_ids]


@pytest.mark.parametrize("loss", [LOST, EngineDead("x"), Draining("x")])
@pytest.mark.parametrize("num_read", range(len(REPLY) + 1))
def test_stream_is_the_same_wherever_it_is_interrupted(num_read, loss):
    backends = replicas((num_read, loss), num_cached=2)

    @with_net(*backends)
    async def _(net):
        events = await answer(net, request(n=2, logprobs=0, prompt_logprobs=1))
        undisturbed = await read(await FakeBackend(REPLY, num_cached=2).submit(backends[0].requests[0]))
        assert events == undisturbed
        assert net.count("tandem_failovers_total") == (num_read < len(REPLY))
        if num_read < len(REPLY):
            [again] = backends[-1].requests
            assert again.generated == ((tuple(REPLY[:num_read]),) * 2 if num_read else ())
            assert again.prompt_logprobs == (None if num_read else 1)


def test_choices_that_have_ended_are_not_asked_for_again():
    @dataclass(eq=False)
    class Uneven(FakeBackend):
        def script(self, request):
            if request.generated:
                return super().script(request)
            ended = super().script(replace(request, n=1))
            return [*ended, [TokenDelta(1, tuple(REPLY[:2]))], []]

    first = Uneven(REPLY, replica_id="a", fail_after=(len(REPLY) + 1, LOST))

    @with_net(first, FakeBackend(REPLY, replica_id="b"))
    async def _(net):
        events = await answer(net, request(n=2))
        assert net.backends[1].requests[0].generated == (None, tuple(REPLY[:2]))
        assert tokens(events, 0) == tokens(events, 1) == REPLY
        assert sorted(e.index for e in events if isinstance(e, Finished)) == [0, 1]


def test_loss_after_every_choice_has_ended_is_the_end():
    @dataclass(eq=False)
    class Silent(FakeBackend):
        def script(self, request):
            return [*super().script(request), []]

    @with_net(Silent(REPLY, replica_id="a", fail_after=(len(REPLY), LOST)), FakeBackend(REPLY, replica_id="b"))
    async def _(net):
        assert tokens(await answer(net, request())) == REPLY
        assert net.backends[1].requests == []


def test_request_that_loses_two_replicas_is_quarantined_and_tried_on_no_third():
    backends = replicas((1, LOST), (1, EngineDead("x")))

    @with_net(*backends)
    async def _(net):
        stream = await net.pool.submit(request())
        net.backends, last = backends[:2], backends[2]
        await net.join()
        got: list[Event] = []
        with pytest.raises(Quarantined, match="2 replicas of tiny"):
            async for events in stream:
                got += events
        assert tokens(got) == REPLY[:2]
        assert not last.requests and [len(b.requests) for b in backends[:2]] == [1, 1]
        assert net.count("tandem_quarantines_total") == 1 and net.count("tandem_failovers_total") == 1
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


def test_replicas_that_drain_do_not_count_as_lost():
    backends = replicas(*[(1, Draining("going"))] * (MAX_LOST + 2))

    async def in_turn(net: Net, stream: Any) -> list[Event]:
        events: list[Event] = []
        for backend in net.backends[1:]:
            events += await anext(stream)
            net.pool.update([entry(backend.replica_id)])
            await joined(net.pool, 1)
        return events + await read(stream)

    @with_net(*backends)
    async def _(net):
        assert tokens(await in_turn(net, await net.pool.submit(request()))) == REPLY
        assert net.count("tandem_failovers_total") == MAX_LOST + 2 and net.count("tandem_quarantines_total") == 0


def test_stream_waits_for_a_replica_to_come_up():
    backends = replicas((2, LOST))

    @with_net(*backends)
    async def _(net):
        stream = await net.pool.submit(request())
        got = [*await anext(stream), *await anext(stream)]
        net.pool.update([])
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not waiting.done()
        net.backends = backends[1:]
        await net.join()
        got += await waiting
        assert tokens(got + await read(stream)) == REPLY


def test_stream_waits_for_a_full_replica_to_have_room(monkeypatch):
    monkeypatch.setattr("serve.gateway.pool.FIRST_RETRY_S", 0.001)
    backends = replicas((2, LOST))
    backends[0].fail_after, backends[1].refusal = (2, LOST), Overloaded("full", retry_after_s=1)

    @with_net(*backends)
    async def _(net):
        stream = await net.pool.submit(request())
        net.backends = backends[1:]
        await net.join()
        got = [*await anext(stream), *await anext(stream)]
        waiting = asyncio.ensure_future(anext(stream))
        while not backends[1].requests:
            await asyncio.sleep(0)
        backends[1].refusal = None
        assert tokens(got + await waiting + await read(stream)) == REPLY


def test_wait_is_bounded():
    backends = replicas((2, LOST))

    @with_net(*backends, failover_wait_s=0.01)
    async def _(net):
        stream = await net.pool.submit(request())
        net.pool.update([])
        with pytest.raises(Unavailable):
            await read(stream)


def test_wait_lasts_as_long_as_a_replica_is_loading():
    backends = replicas((2, LOST))

    @with_net(*backends, failover_wait_s=0.01)
    async def _(net):
        stream = await net.pool.submit(request())
        got = [*await anext(stream), *await anext(stream)]
        net.pool.update([entry("last", address="", kind="")])
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        net.backends = backends[1:]
        await net.join()
        assert tokens(got + await waiting + await read(stream)) == REPLY


async def updated(net: Net, *marks: str) -> None:
    """The replicas as they are after an update."""
    net.pool.update([entry(b.replica_id, fingerprint=mark) for b, mark in zip(net.backends, marks, strict=True)])
    await joined(net.pool, len(net.backends))


@pytest.mark.parametrize("loss", [LOST, Draining("x")])
def test_a_stream_goes_on_only_where_model_and_config_are_those_it_was_begun_with(loss):
    old, new, other = (FakeBackend(REPLY, replica_id=name) for name in ("old", "new", "other"))
    old.fail_after = (2, loss)

    @with_net(old, new, other)
    async def _(net):
        await updated(net, "1", "2", "1")
        streams = [await net.pool.submit(request()) for _ in range(3)]
        old.is_draining = isinstance(loss, Draining)
        assert [tokens(await read(stream)) for stream in streams] == [REPLY] * 3
        assert all(not again.generated for again in new.requests) and any(r.generated for r in other.requests)


def test_a_stream_whose_version_is_gone_ends_with_an_error_and_what_had_shown_nothing_begins_anew():
    for num_read in (0, 2):
        old, new = FakeBackend(REPLY, replica_id="old", fail_after=(num_read, LOST)), FakeBackend(REPLY, replica_id="z")

        @with_net(old, new)
        async def _(net, num_read=num_read, old=old, new=new):
            stream = await net.pool.submit(request())
            net.pool.update([])
            net.backends = [new]
            await updated(net, "2")
            if not num_read:
                assert tokens(await read(stream)) == REPLY
                return
            with pytest.raises(ReplicaLost, match="another version"):
                await read(stream)
            assert not new.requests


def test_deadline_counts_from_the_first_acceptance():
    backends = replicas((2, LOST))

    @with_net(*backends)
    async def _(net):
        stream = await net.pool.submit(request(timeout_s=20))
        await net.join()
        await read(stream)
        assert 0 < backends[1].requests[0].timeout_s < 20

    @with_net(replicas((2, LOST))[0])
    async def _(net):
        stream = await net.pool.submit(request(timeout_s=0.02))
        net.pool.update([])
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await read(stream)


def test_reader_that_leaves_while_it_waits_leaves_nothing_behind():
    backends = replicas((2, LOST))

    @with_net(*backends)
    async def _(net):
        stream = await net.pool.submit(request())
        net.pool.update([])
        waiting = asyncio.ensure_future(read(stream))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await stream.aclose()
        net.backends = backends[1:]
        await net.join()
        assert not backends[1].requests


def test_beams_are_searched_again_and_what_was_shown_is_not_shown_twice():
    @with_net(*replicas((3, LOST), card=card(is_reproducible=False)))  # no draft has a part in beams
    async def _(net):
        asked = request(beams=BeamParams(num_beams=2), logprobs=0)
        events = await answer(net, asked)
        assert net.backends[1].requests == [asked]
        assert tokens(events) == REPLY and sum(isinstance(e, Finished) for e in events) == 1
        assert [s.token_id for e in events if isinstance(e, TokenDelta) for s in e.logprobs] == REPLY


@pytest.mark.parametrize(("num_read", "temperature", "goes_on"), [(0, 1.0, True), (2, 1.0, False), (2, 0.0, True)])
def test_tokens_that_chance_rejected_drafts_for_cannot_go_on_exactly(num_read, temperature, goes_on):
    """Greedy ones can, and a request of which nothing was shown begins anew."""

    @with_net(*replicas((num_read, LOST), card=card(is_reproducible=False)))
    async def _(net):
        stream = await net.pool.submit(request(temperature=temperature))
        await net.join()
        if goes_on:
            assert tokens(await read(stream)) == REPLY
            return
        with pytest.raises(ReplicaLost, match="coupled"):
            await read(stream)
        assert not net.backends[1].requests


@pytest.mark.parametrize("num_read", range(8))
def test_images_are_drawn_again_without_going_backwards(num_read):
    """Four steps, then three files."""
    a, b = (FakeImageBackend(replica_id=name, card=image_card()) for name in "ab")
    a.fail_after = (num_read, LOST)

    @with_net(a, b)
    async def _(net):
        asked = image_request(3, num_previews=2)
        events = await answer(net, asked)
        undisturbed = await read(await FakeImageBackend().submit(asked))
        for kind in (DenoiseProgress, ImagePreview, ImageReady, Finished):
            assert [e for e in events if isinstance(e, kind)] == [e for e in undisturbed if isinstance(e, kind)]
        if 4 < num_read < 7:
            assert b.requests[0].delivered == tuple(range(num_read - 4))


def test_prompt_is_scored_by_the_second_replica_when_the_first_did_not_get_to_it():
    @with_net(*replicas((0, LOST)))
    async def _(net):
        events = await answer(net, request(prompt_logprobs=0))
        assert sum(isinstance(e, PromptScored) for e in events) == 1


def told(*backends: FakeBackend, **fields: Any) -> list[Any]:
    """The answers to two equal requests, one for each replica."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": len(REPLY), **fields}

    async def run() -> list[Any]:
        async with fake_gateway(*backends) as gateway:
            return [(await call(gateway, "/v1/completions", body)).json() for _ in range(2)]

    return asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("num_read", range(len(REPLY)))
def test_stop_strings_and_text_do_not_notice(num_read):
    """The stop string spans tokens, so part of it is held back wherever the stream is cut."""
    fields = {"n": 2, "stop": "and the c", "logprobs": 1}
    undisturbed = told(FakeBackend(REPLY), **fields)[0]
    broken = FakeBackend(REPLY, replica_id="a", fail_after=(num_read, LOST))
    for answer in told(broken, FakeBackend(REPLY, replica_id="b"), **fields):
        assert answer["choices"] == undisturbed["choices"] and answer["usage"] == undisturbed["usage"]
    assert undisturbed["choices"][0]["text"] == "the big grey dog " and broken.requests


def test_quarantined_request_is_an_error_that_clients_do_not_repeat():
    async def run() -> None:
        poisoned = [FakeBackend(REPLY, replica_id=name, fail_after=(0, LOST)) for name in "abc"]
        async with fake_gateway(*poisoned) as gateway:
            reply = await call(gateway, "/v1/completions", {"model": "tiny", "prompt": "a"})
            assert reply.status == 500 and reply.headers["x-should-retry"] == "false"
            assert reply.json()["error"]["code"] == "quarantined"
            assert sum(len(backend.requests) for backend in poisoned) == 2
            assert gateway.metric("tandem_quarantines_total") == 1

    asyncio.run(asyncio.wait_for(run(), 30))


@dataclass(eq=False)
class Dying(FakeBackend):
    """Dies of every request, before it has accepted it."""

    async def submit(self, request):
        self.requests.append(request)
        self.is_alive = False
        raise LOST


def test_death_before_acceptance_counts_as_well():
    dying = [Dying(replica_id=name) for name in "abc"]

    @with_net(*dying)
    async def _(net):
        await net.join()
        with pytest.raises(Quarantined):
            await net.pool.submit(request())
        assert sum(len(backend.requests) for backend in dying) == MAX_LOST


def test_one_death_is_counted_once():
    """The engine has died and said so; while its process ends the request meets it again."""

    @dataclass(eq=False)
    class Ending(FakeBackend):
        async def submit(self, request):
            if not self.requests:
                return await super().submit(request)
            self.is_alive = False
            raise LOST

    first = Ending(REPLY, replica_id="a", fail_after=(2, EngineDead("x")))

    @with_net(first, FakeBackend(REPLY, replica_id="b"))
    async def _(net):
        stream = await net.pool.submit(request())
        got = [*await anext(stream), *await anext(stream)]
        waiting = asyncio.ensure_future(anext(stream))
        while first.is_alive:
            await asyncio.sleep(0)
        await net.join()
        assert tokens(got + await waiting + await read(stream)) == REPLY


@dataclass(eq=False)
class Fragile(FakeBackend):
    """Ends, with all it has, in the first step of a poisonous request."""

    async def submit(self, request):
        if request.request_id == "poison":
            self.is_alive, self.fail_after = False, (0, LOST)
        return await super().submit(request)


def test_neighbours_of_a_poisonous_request_are_tried_alone_and_keep_their_answers():
    """It ends two replicas with all of them, and a third that tells it from the others."""
    backends = [Fragile(REPLY, replica_id=f"r{i}") for i in range(4)]

    @with_net(*backends)
    async def _(net):
        streams = [await net.pool.submit(replace(request(), request_id=f"good {i}")) for i in range(4)]
        streams.append(await net.pool.submit(replace(request(), request_id="poison")))
        await net.join()
        answers = await asyncio.gather(*(read(stream) for stream in streams), return_exceptions=True)
        assert [tokens(answer) for answer in answers[:4]] == [REPLY] * 4
        assert isinstance(answers[4], Quarantined) and net.count("tandem_quarantines_total") == 1
        assert sum(not backend.is_alive for backend in backends) <= 3


@dataclass(eq=False)
class Doomed(FakeBackend):
    """On a node that dies: from `is_dying` on it accepts nothing any more, and what it has is lost with its gate."""

    is_dying: bool = False

    async def submit(self, request):
        if not self.is_dying:
            return await super().submit(request)
        self.requests.append(request)
        await self.gate.wait()
        self.is_alive = False
        raise LOST

    def end(self) -> None:
        self.fail_after = 0, LOST
        self.gate.set()


@pytest.mark.parametrize("accepts", [True, False])
def test_a_node_that_dies_with_two_replicas_costs_no_request(accepts):
    """What the first one had goes to the second, which is still thought to work, and ends with it on the way or there;
    the hub no longer names either by then."""
    doomed = [Doomed(REPLY, replica_id=f"r{i}", gate=asyncio.Event()) for i in range(2)]

    @with_net(*doomed, FakeBackend(REPLY, replica_id="r2"))
    async def _(net):
        net.backends, last = doomed, net.backends[2]
        await net.join()
        streams = [await net.pool.submit(replace(request(), request_id=f"{i}")) for i in range(6)]
        readers = [asyncio.ensure_future(read(stream)) for stream in streams]
        first, second = doomed
        assert len(first.requests) == len(second.requests) == 3
        second.is_dying = not accepts
        first.end()
        first.is_alive = False
        while len(second.requests) < 6:
            await asyncio.sleep(0)
        if accepts:
            net.pool.update([])
        second.end()
        second.is_alive = False
        while second.open:
            await asyncio.sleep(0)
        net.backends = [last]
        await net.join()
        assert [tokens(each) for each in await asyncio.gather(*readers)] == [REPLY] * 6
        assert net.count("tandem_quarantines_total") == 0


def test_new_requests_that_meet_two_deaths_together_are_tried_alone_too():
    doomed = [Doomed(REPLY, replica_id=f"r{i}", gate=asyncio.Event(), is_dying=True) for i in range(2)]

    @with_net(*doomed, FakeBackend(REPLY, replica_id="r2"))
    async def _(net):
        net.backends, last = doomed, net.backends[2]
        await net.join()
        doomed[1].backlog_s = 1000.0
        asked = [asyncio.ensure_future(answer(net, replace(request(), request_id=f"{i}"))) for i in range(2)]
        for dying in doomed:
            while len(dying.requests) < 2:
                await asyncio.sleep(0)
            dying.end()
        net.backends = [last]
        await net.join()
        assert [tokens(each) for each in await asyncio.gather(*asked)] == [REPLY] * 2
