"""The wire: what is encoded is what is decoded, and nothing else is."""

from __future__ import annotations

import contextlib
import pickle

import msgspec
import pytest
from fake_backend import card
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import wire
from serve.backend import Load
from serve.errors import Overloaded
from serve.events import Finished, FinishReason, PromptScored, TokenDelta, TokenLogprobs, Usage
from serve.metrics import Series, Snapshot
from serve.request import SamplingParams, TextRequest

ALL = frozenset(wire.FRAMES)
ids = st.integers(0, 1 << 32)
floats = st.floats(allow_nan=False)
alternatives = st.lists(st.tuples(ids, floats), max_size=3).map(tuple)
logprobs = st.builds(TokenLogprobs, ids, floats, st.integers(1, 1 << 20), alternatives)
tokens = st.lists(ids, max_size=5).map(tuple)
deltas = st.builds(TokenDelta, st.integers(0, 128), tokens, st.none() | st.lists(logprobs, max_size=3).map(tuple))
scored = st.builds(PromptScored, st.lists(st.none() | logprobs, max_size=3).map(tuple))
usages = st.builds(Usage, ids, ids, ids)
ends = st.builds(
    Finished, st.integers(0, 128), st.sampled_from(FinishReason), usages, st.none() | ids, st.none() | logprobs
)
params = st.builds(
    SamplingParams, max_tokens=ids, temperature=floats, seed=st.integers(0, 2**64 - 1), logit_bias=alternatives,
    stop_token_ids=tokens, logprobs=st.none() | st.integers(0, 20),
)  # fmt: skip
requests = st.builds(
    TextRequest, request_id=st.text(), model=st.text(), prompt_token_ids=tokens, sampling=params,
    priority=st.integers(-100, 100), timeout_s=st.none() | floats, cache_salt=st.text(),
)  # fmt: skip


def crossed(frame: wire.Frame) -> wire.Frame:
    """The frame after its journey."""
    data = wire.encode(frame)
    length, kind = wire.HEADER.unpack_from(data)
    assert len(data) == wire.HEADER.size + length
    return wire.decode(kind, data[wire.HEADER.size :], ALL)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, st.lists(deltas | scored | ends, max_size=4)), max_size=4))
def test_events_arrive_as_they_left(streams):
    packed = wire.Step([(stream, wire.EVENTS.pack(events)) for stream, events in streams], [3], [])
    step = crossed(packed)
    assert [(stream, wire.EVENTS.unpack(events)) for stream, events in step.events] == streams and step.ended == [3]


@settings(max_examples=60, deadline=None)
@given(requests)
def test_requests_arrive_as_they_left(request):
    frame = crossed(wire.Submit(7, wire.REQUESTS.pack([request])[0]))
    assert wire.REQUESTS.unpack([frame.request]) == [request]


@pytest.mark.parametrize(
    "frame",
    [
        wire.Ping(),
        wire.Hello("gateway-0/ff"),
        wire.Welcome("replica-0", card(), {"tokenizer.json": b"\0\xff", "config.json": b"{}"}),
        wire.Accepted(1),
        wire.Refused(1, wire.Failure.of(Overloaded("full", param="n", retry_after_s=0.5))),
        wire.Step([], [], [(2, wire.Failure("replica_lost", "gone"))]),
        wire.Cancel(9),
        wire.Credit([(1, 32)]),
        wire.LoadReport(Load(running=1, waiting=2, tokens_waiting=300, memory=0.5, backlog_s=1.5), 7),
        wire.TurnedAway(2.5),
        wire.PrefixReport(16, True, b"12345678", b""),
        wire.Drain(),
        wire.Join("gateway-0", "life"),
        wire.Push(Snapshot("gateway-0", (Series("tandem_step_jobs", ("m",), (1.0, 2.0)),))),
        wire.Register(wire.ReplicaEntry("replica-0", "m", "text", "unix:/x")),
        wire.Follow(),
        wire.Entries([]),
        wire.Change([wire.ReplicaEntry("replica-0", "m", "text", "unix:/x")], ["replica-1"]),
        wire.Scrape(1),
        wire.Exposition(1, "# HELP\n"),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_every_frame_arrives_as_it_left(frame):
    assert crossed(frame) == frame


def test_an_error_arrives_with_its_class_and_fields():
    error = wire.Failure.of(Overloaded("full", param="n", retry_after_s=0.5)).error()
    assert (type(error), error.message, error.param, error.retry_after_s) == (Overloaded, "full", "n", 0.5)


SUBMIT, CANCEL = wire.FRAMES.index(wire.Submit), wire.FRAMES.index(wire.Cancel)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (200, []),
        (CANCEL, ["7"]),
        (CANCEL, [7.5]),
        (CANCEL, [7, 8]),
        (CANCEL, []),
        (CANCEL, {"stream": 7}),
        (SUBMIT, [1, [9, "r"]]),
        (SUBMIT, [1, {"request_id": "r"}]),
        (SUBMIT, [1, pickle.dumps(("r",))]),
    ],
)
def test_what_is_not_exactly_a_frame_is_malformed(kind, payload):
    with pytest.raises(wire.Malformed):
        wire.decode(kind, msgspec.msgpack.encode(payload), ALL)


@pytest.mark.parametrize(
    "change", [lambda r: [*r, 1], lambda r: r[:-1], lambda r: [9, *r[1:]], lambda r: [r[0], 5, *r[2:]]]
)
def test_a_request_with_a_field_too_many_too_few_or_of_another_type_is_malformed(change):
    request = TextRequest(request_id="r", model="m", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1))
    good = list(wire.REQUESTS.pack([request])[0])
    wire.decode(SUBMIT, msgspec.msgpack.encode([1, good]), ALL)
    with pytest.raises(wire.Malformed):
        wire.decode(SUBMIT, msgspec.msgpack.encode([1, change(good)]), ALL)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(wire.FRAMES) + 2), st.binary(max_size=40))
def test_garbage_is_malformed_or_a_frame_and_nothing_else(kind, payload):
    with contextlib.suppress(wire.Malformed):
        wire.decode(kind, payload, ALL)


def test_deep_nesting_is_malformed():
    with pytest.raises(wire.Malformed):
        wire.decode(SUBMIT, b"\x91" * 100_000, ALL)


def test_a_frame_that_this_side_does_not_accept_is_malformed():
    with pytest.raises(wire.Malformed, match="not expected"):
        wire.decode(CANCEL, msgspec.msgpack.encode([1]), frozenset({wire.Ping}))


def test_a_frame_over_the_limit_is_refused_where_it_is_made(monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(wire.FrameTooLarge, match="Welcome of"):
        wire.encode(wire.Welcome("r", card(), {"x": b"0" * 100}))


@pytest.mark.parametrize("text", ["unix:/run/x.sock", "tcp:127.0.0.1:80", "tcp:[::1]:0", "tcp:node-1:65535"])
def test_addresses_are_read_and_written(text):
    assert str(wire.Address.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "unix:", "unix:x", "tcp:", "tcp:1", "tcp::1", "tcp:h:", "tcp:h:65536", "tcp:h:-1", "http://h"]
)
def test_what_is_no_address_is_refused_with_the_forms(text):
    with pytest.raises(ValueError, match="give unix:/absolute/path or tcp:host:port"):
        wire.Address.parse(text)
