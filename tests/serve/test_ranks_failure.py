"""Which of several losses is told as the cause."""

from __future__ import annotations

import json

from serve.errors import ConfigError, EngineDead
from serve.ranks.failure import Loss, first_cause, is_echo

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4711"


def loss(rank: int, error: Exception, **more: str) -> Loss:
    words = {"type": type(error).__name__, "message": str(error), "is_echo": is_echo(error), **more}
    return Loss.from_words(rank, f"pid {rank}", json.dumps(words).encode())


def test_own_words_come_before_an_end_without_words_and_that_before_a_failed_collective():
    words, silent, echo = loss(3, ValueError("bad")), Loss(2, "pid 2", "killed by SIGKILL"), loss(1, RuntimeError(GLOO))
    assert first_cause([echo, silent, words]) is words
    assert first_cause([echo, silent]) is silent
    assert first_cause([echo]) is echo


def test_the_earliest_of_equals_is_the_cause():
    first, second = loss(2, ValueError("first")), loss(1, ValueError("second"))
    assert first_cause([first, second]) is first


def test_a_wrong_option_stays_one_with_its_field():
    error = loss(1, ConfigError("model: no weights", param="model"), code=ConfigError.code, param="model").to_error()
    assert isinstance(error, ConfigError)
    assert (error.message, error.param) == ("model: no weights", "model")


def test_anything_else_names_the_rank_and_its_words():
    error = loss(1, ValueError("bad")).to_error()
    assert isinstance(error, EngineDead)
    assert error.message == "rank 1 (pid 1) failed: ValueError: bad"
