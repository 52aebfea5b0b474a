"""What would wait longer than it may is refused, with the time after which it would not."""

import pytest

from serve.errors import Overloaded
from serve.gateway.routing import Prediction
from serve.gateway.shedding import MOST_BOOKED_S, Coming, Returns, too_late
from serve.request import SamplingParams, TextRequest
from serve.wire import ReplicaEntry


def request(timeout_s: float | None) -> TextRequest:
    return TextRequest(
        request_id="r", model="m", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=4), timeout_s=timeout_s
    )


def predictions(*waits_s: float) -> list[Prediction]:
    return [Prediction(f"replica-{number}", wait_s, 5.0, ()) for number, wait_s in enumerate(waits_s)]


@pytest.mark.parametrize(
    ("timeout_s", "max_wait_s", "waits_s"),
    [(None, None, [1e6]), (10.0, None, [30.0, 10.0]), (600.0, 4.0, [3.9, 50.0]), (None, 1.0, [])],
)
def test_a_request_that_some_replica_takes_in_time_is_let_in(timeout_s, max_wait_s, waits_s):
    assert too_late(request(timeout_s), predictions(*waits_s), max_wait_s=max_wait_s, due_s=None) is None


@pytest.mark.parametrize(
    ("timeout_s", "max_wait_s", "due_s", "told", "retry_after_s"),
    [
        (10.0, None, None, "longer than its own timeout of 10 s", 20.0),
        (600.0, 4.0, None, "longer than the limit here, 4 s", 26.0),
        (600.0, 4.0, 7.0, "longer than the limit here, 4 s", 7.0),
        (600.0, 4.0, 70.0, "longer than the limit here, 4 s", 26.0),
    ],
)
def test_one_that_would_wait_too_long_everywhere_is_told_when_to_come(
    timeout_s, max_wait_s, due_s, told, retry_after_s
):
    refusal = too_late(request(timeout_s), predictions(45.0, 30.0), max_wait_s=max_wait_s, due_s=due_s)
    assert isinstance(refusal, Overloaded) and told in refusal.message
    assert refusal.retry_after_s == retry_after_s


def test_a_replica_that_loads_is_due_when_others_of_its_model_were_up():
    now = 0.0
    coming = Coming(lambda: now)
    first, second = ReplicaEntry("a", "m", "text", ""), ReplicaEntry("b", "m", "text", "")
    assert coming.due_s("m", 20.0) is None
    coming.update([first])
    now = 15.0
    coming.update([first, second])
    assert (coming.due_s("m", 20.0), coming.due_s("other", 20.0)) == (5.0, None)
    coming.update([second])
    assert coming.due_s("m", 20.0) == 20.0
    now = 50.0
    assert coming.due_s("m", 20.0) == 0.0


def test_those_refused_together_come_back_one_after_the_other():
    now = 100.0
    returns = Returns(lambda: now)
    assert [returns.book("m", 4.0, 0.5) for _ in range(4)] == [4.0, 4.5, 5.0, 5.5]
    assert returns.book("other", 4.0, 0.5) == 4.0
    assert returns.book("m", 0.5, 0.5) == 0.5, "a replica that loads is due before"
    now = 105.0  # one comes now, and one is not due yet
    assert [returns.book("m", 0.0, 0.5) for _ in range(2)] == [1.0, 1.5]
    now = 200.0  # all of them are
    assert returns.book("m", 0.0, 0.5) == 0.0


def test_nobody_is_told_to_wait_for_ever_because_many_were_told_to_come():
    returns = Returns(lambda: 0.0)
    told = [returns.book("m", 2.0, 1.0) for _ in range(500)]
    assert told[:60] == [2.0 + number for number in range(60)] and set(told[60:]) == {2.0 + MOST_BOOKED_S}
