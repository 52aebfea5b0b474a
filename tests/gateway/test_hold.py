"""Requests wait for a model that sleeps, wake it, and are let go when it does not come."""

from __future__ import annotations

import asyncio

import pytest

from serve.errors import Unavailable
from serve.gateway.hold import Hold, Sleeper, sleepers
from serve.options import AutoscalingOptions, ModelOptions


class Model:
    """Comes up when told to."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.is_there = False
        self.num_calls = 0
        self.num_open = 0

    def is_up(self) -> asyncio.Event | None:
        return None if self.is_there else self.changed

    async def wake(self, name: str) -> None:
        self.num_calls += 1
        self.num_open += 1
        try:
            await self.changed.wait()
        finally:
            self.num_open -= 1

    def come_up(self) -> None:
        self.is_there = True
        self.changed.set()


def holding(**options) -> tuple[Hold, Model]:
    model = Model()
    return Hold([Sleeper("m", ("alias",))], model.wake, **options), model


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_models_that_may_have_no_replica_are_known_by_every_name():
    elastic = AutoscalingOptions(min_replicas=0)
    models = [
        ModelOptions(model="a", served_model_name=("m", "alias"), autoscaling_config=elastic),
        ModelOptions(model="b", autoscaling_config=AutoscalingOptions(min_replicas=1)),
        ModelOptions(model="c"),
    ]
    hold = Hold(sleepers(models))
    assert [hold.find(name) for name in ("m", "alias", None, "b", "a")] == [Sleeper("m", ("alias",))] * 3 + [None] * 2


def test_many_requests_wake_a_model_with_one_call_and_go_on_when_it_is_up():
    async def test() -> None:
        hold, model = holding()
        waits = [asyncio.create_task(hold.wait("m", model.is_up, 60)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (hold.num_held("m"), model.num_calls) == (5, 1)
        model.come_up()
        await asyncio.gather(*waits)
        assert hold.num_held("m") == 0

    run(test)


def test_a_model_that_is_up_is_not_woken():
    async def test() -> None:
        hold, model = holding()
        model.come_up()
        await hold.wait("m", model.is_up, 60)
        await asyncio.sleep(0)
        assert model.num_calls == 0

    run(test)


@pytest.mark.parametrize(("own_s", "wake_timeout_s"), [(0.01, 60.0), (60.0, 0.01)])
def test_a_model_that_does_not_come_is_unavailable_and_no_longer_woken(own_s, wake_timeout_s):
    async def test() -> None:
        hold, model = holding(timeout_s=wake_timeout_s)
        with pytest.raises(Unavailable, match=r"no replica of 'm' came up within 0\.01 s"):
            await hold.wait("m", model.is_up, own_s)
        with pytest.raises(Unavailable) as caught:
            await hold.wait("m", model.is_up, own_s, lambda: 7.0)
        assert caught.value.retry_after_s == 7.0
        await asyncio.sleep(0)
        assert (hold.num_held("m"), model.num_open) == (0, 0)

    run(test)


def test_a_client_that_leaves_lets_the_model_sleep():
    async def test() -> None:
        hold, model = holding()
        first, second = (asyncio.create_task(hold.wait("m", model.is_up, 60)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        assert (hold.num_held("m"), model.num_open) == (1, 1)
        second.cancel()
        await asyncio.wait({second})
        await asyncio.sleep(0)
        assert (hold.num_held("m"), model.num_open) == (0, 0)

    run(test)


def test_a_call_that_fails_is_made_again(monkeypatch):
    monkeypatch.setattr("serve.gateway.hold.WAKE_AGAIN_S", 0.0)

    async def test() -> None:
        hold, model = holding()
        wake, failures = model.wake, [RuntimeError("no such actor"), TimeoutError()]

        async def fail_first(name: str) -> None:
            if failures:
                raise failures.pop()
            await wake(name)

        hold._wake = fail_first
        wait = asyncio.create_task(hold.wait("m", model.is_up, 60))
        while not model.num_calls:
            await asyncio.sleep(0)
        model.come_up()
        await wait

    run(test)


def test_waits_for_models_that_never_sleep_wake_nobody():
    hold, _ = holding()
    with hold.waking("other"):
        pass
