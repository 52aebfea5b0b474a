"""What of a request counts as a promise met or missed."""

from __future__ import annotations

import pytest
from fake_backend import card

from serve.errors import DeadlineExceeded, InvalidRequest, Overloaded, ReplicaLost, RequestFailed
from serve.gateway.errors import ClientGone
from serve.gateway.promises import Promises, availability
from serve.recorder import Recorder

GONE = ClientGone("left")


@pytest.fixture
def recorder():
    recorder = Recorder("g", "gateway")
    recorder.admit("fake")
    return recorder


def verdicts(recorder: Recorder, objective: str) -> tuple[float, float]:
    return tuple(
        recorder.cell("tandem_slo_requests_total", model="fake", objective=objective, verdict=verdict).values[0]
        for verdict in ("met", "missed")
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, (1, 0)),
        (RequestFailed("x"), (0, 1)),
        (ReplicaLost("x"), (0, 1)),
        (DeadlineExceeded("x"), (0, 1)),
        (ValueError("a bug"), (0, 1)),
        (InvalidRequest("x"), (0, 0)),
        (Overloaded("x"), (0, 0)),
        (GONE, (0, 0)),
    ],
)
def test_availability_counts_what_the_server_owes(recorder, error, expected):
    availability(recorder, "fake", error)
    assert verdicts(recorder, "availability") == expected


@pytest.mark.parametrize(
    ("since_s", "error", "has_come", "expected"),
    [
        (1.9, None, True, (1, 0)),
        (2.1, None, True, (0, 1)),
        (1.0, GONE, True, (1, 0)),
        (1.0, GONE, False, (0, 0)),
        (2.1, GONE, False, (0, 1)),
        (1.0, RequestFailed("x"), False, (0, 1)),
    ],
)
def test_first_token_is_in_time_or_missed_and_an_early_leaver_counts_for_neither(
    recorder, since_s, error, has_come, expected
):
    Promises(recorder, card()).first_token(since_s, error, has_come=has_come)
    assert verdicts(recorder, "ttft") == expected


def test_later_tokens_have_a_mean_to_keep(recorder):
    promises = Promises(recorder, card())
    promises.later_tokens(0.1)
    promises.later_tokens(0.11)
    assert verdicts(recorder, "tpot") == (1, 1)


@pytest.mark.parametrize(
    ("since_s", "error", "expected"),
    [
        (59.0, None, (1, 0)),
        (61.0, None, (0, 1)),
        (5.0, DeadlineExceeded("x"), (0, 1)),
        (5.0, GONE, (0, 0)),
        (61.0, GONE, (0, 1)),
    ],
)
def test_images_meet_the_promise_and_their_own_deadline(recorder, since_s, error, expected):
    Promises(recorder, card()).image(since_s, error)
    assert verdicts(recorder, "image_deadline") == expected
