"""What travels between Tandem's processes: typed frames, their bytes, and the addresses they are sent to.

    | length, 4 bytes, big-endian | kind, 1 byte | payload: msgpack, `length` bytes |

A frame is a frozen msgspec struct written as an array. Decoding is strict: an unknown kind, a missing or surplus field
or a value of another type is `Malformed`, and the connection ends. Nothing is ever unpickled. What is asked and what is
answered are the dataclasses of `serve/request.py` and `serve/events.py`, told apart by a number (`Tagged`).
"""

from __future__ import annotations

import dataclasses
import operator
import struct
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, TypeVar

import msgspec

from serve.backend import Load
from serve.errors import TandemError, by_code
from serve.events import Event
from serve.metrics import Snapshot
from serve.request import ModelCard, Request

PROTOCOL_VERSION = 5
"""Raised whenever a frame changes: processes of different versions refuse each other at once."""
MAX_FRAME_BYTES = 64 << 20
"""Bounds what a peer can make this process hold. The largest frames are tokenizer bundles (about 20 MB today) and the
log-probabilities of a long prompt."""

HEADER = struct.Struct(">IB")
T = TypeVar("T")


class Malformed(Exception):
    """Bytes that are no frame this side may receive. The connection that brought them ends."""


class FrameTooLarge(Exception):
    """A frame of our own that the other side would refuse."""


class Tagged(Generic[T]):
    """A union of frozen dataclasses as arrays that begin with a class's number: msgspec tells only structs apart."""

    def __init__(self, union: Any):
        self._pack: dict[type, Callable[[T], tuple[Any, ...]]] = {}
        self._unpack: dict[type, Callable[[Any], T]] = {}
        for number, cls in enumerate(typing.get_args(union) or (union,)):
            hints = typing.get_type_hints(cls)
            names = [field.name for field in dataclasses.fields(cls)]
            mirror = msgspec.defstruct(
                cls.__name__,
                [(name, hints[name]) for name in names],
                array_like=True,
                frozen=True,
                tag=number,
                forbid_unknown_fields=True,
            )
            self._pack[cls] = _packer(number, names)
            self._unpack[mirror] = _unpacker(cls, names)
        self.mirror: Any = reduce(operator.or_, self._unpack)
        """The type to decode as."""

    def pack(self, values: Iterable[T]) -> list[Any]:
        """As msgspec writes them."""
        return [self._pack[type(value)](value) for value in values]

    def unpack(self, mirrors: Iterable[Any]) -> list[T]:
        return [self._unpack[type(mirror)](mirror) for mirror in mirrors]


def _packer(number: int, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    read = _reader(names)
    return lambda value: (number, *read(value))


def _unpacker(cls: type, names: Sequence[str]) -> Callable[[Any], Any]:
    read = _reader(names)
    if any(field.kw_only for field in dataclasses.fields(cls)):
        return lambda mirror: cls(**dict(zip(names, read(mirror))))
    return lambda mirror: cls(*read(mirror))


def _reader(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Attributes as a tuple, in C."""
    if len(names) == 1:
        read_one = operator.attrgetter(names[0])
        return lambda value: (read_one(value),)
    return operator.attrgetter(*names)


EVENTS: Tagged[Event] = Tagged(Event)
REQUESTS: Tagged[Request] = Tagged(Request)


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message. Streams are numbered by the gateway."""


class Failure(Frame, frozen=True):
    """A `TandemError` on its way."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: TandemError) -> Failure:
        return cls(error.code, error.message, error.param, error.retry_after_s)

    def error(self) -> TandemError:
        return by_code(self.code, self.message, param=self.param, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class ReplicaEntry:
    """A replica in the hub's registry, and where its channel listens."""

    replica_id: str
    model: str
    kind: str
    """Empty while it is not known."""
    address: str
    """Empty while the model is loaded: there is nothing to connect to, but there will be."""
    fingerprint: str = ""
    """Of model and config (`serve/fingerprint.py`)."""


class Ping(Frame, frozen=True):
    """I am alive. Sent by both sides whenever they have nothing else to say; needs no answer."""


class Hello(Frame, frozen=True):
    """Gateway → replica, first."""

    gateway_id: str


class Welcome(Frame, frozen=True):
    """Replica → gateway, in answer: what is served here and how its text is made."""

    replica_id: str
    card: ModelCard
    bundle: dict[str, bytes]


class Submit(Frame, frozen=True):
    """Gateway → replica. `request` is one of `REQUESTS`."""

    stream: int
    request: REQUESTS.mirror  # type: ignore[name-defined]


class Accepted(Frame, frozen=True):
    """Replica → gateway: the stream is open."""

    stream: int


class Refused(Frame, frozen=True):
    """Replica → gateway: there is no such stream, and why."""

    stream: int
    failure: Failure


class Step(Frame, frozen=True):
    """Replica → gateway: everything that became ready in one turn of the event loop, of all streams."""

    events: list[tuple[int, list[EVENTS.mirror]]]  # type: ignore[name-defined]
    ended: list[int]
    """Streams that are complete."""
    failed: list[tuple[int, Failure]]


class Cancel(Frame, frozen=True):
    """Gateway → replica: nobody reads this stream any more."""

    stream: int


class Credit(Frame, frozen=True):
    """Gateway → replica: (stream, pieces its reader has taken since the last credit)."""

    taken: list[tuple[int, int]]


class TurnedAway(Frame, frozen=True):
    """Gateway → replica: so many seconds of work would have been sent here, had the wait not been too long."""

    work_s: float


class LoadReport(Frame, frozen=True):
    """Replica → gateway, when it has changed, ten times a second."""

    load: Load
    newest: int
    """The highest stream number that it counts, of this gateway's."""


class PrefixReport(Frame, frozen=True):
    """Replica → gateway, with a load report: how its digest of cached prefixes has changed."""

    block_size: int
    is_whole: bool
    """`added` is all there is."""
    added: bytes
    removed: bytes
    """Keys of 8 bytes, end to end."""


class Drain(Frame, frozen=True):
    """Replica → gateway: nothing new is accepted here; open streams go on."""


class Join(Frame, frozen=True):
    """Process → hub, first. `incarnation` differs between two lives of a process of the same name."""

    process: str
    incarnation: str


class Push(Frame, frozen=True):
    """Process → hub: all it has counted so far."""

    snapshot: Snapshot


class Register(Frame, frozen=True):
    """Replica → hub: gateways may connect. Ends with the connection."""

    entry: ReplicaEntry


class Follow(Frame, frozen=True):
    """Gateway → hub: tell of all replicas, and from then on of changes."""


class Entries(Frame, frozen=True):
    """Hub → gateway that follows, first: all registered replicas."""

    entries: list[ReplicaEntry]


class Change(Frame, frozen=True):
    """Hub → gateway that follows: what differs from what it was told before. Hub → replica: it is registered."""

    came: list[ReplicaEntry]
    """New, or another entry than before."""
    gone: list[str]
    """Ids."""


class Scrape(Frame, frozen=True):
    """Process → hub: send the exposition text."""

    number: int


class Exposition(Frame, frozen=True):
    """Hub → process, in answer."""

    number: int
    text: str


FRAMES: tuple[type[Frame], ...] = (
    Ping, Hello, Welcome, Submit, Accepted, Refused, Step, Cancel, Credit, TurnedAway, LoadReport, PrefixReport, Drain,
    Join, Push, Register, Follow, Entries, Change, Scrape, Exposition,
)  # fmt: skip
"""A frame's kind is its place here."""

_KINDS = {frame: kind for kind, frame in enumerate(FRAMES)}
_DECODERS = [msgspec.msgpack.Decoder(frame) for frame in FRAMES]
_ENCODER = msgspec.msgpack.Encoder()


def encode(frame: Frame) -> bytes:
    """The frame's bytes, header included. Raises FrameTooLarge."""
    payload = _ENCODER.encode(frame)
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"a {type(frame).__name__} of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(payload), _KINDS[type(frame)]) + payload


def decode(kind: int, payload: bytes | memoryview, accepts: frozenset[type[Frame]]) -> Frame:
    """The frame of that kind, if it is one of those that this side accepts. Raises Malformed."""
    if kind >= len(FRAMES) or FRAMES[kind] not in accepts:
        raise Malformed(f"frame kind {kind} is not expected here")
    try:
        return _DECODERS[kind].decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"{FRAMES[kind].__name__}: {error}") from None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens: `unix:/path` or `tcp:host:port` (an IPv6 host in brackets)."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        scheme, _, rest = text.partition(":")
        host, _, port = rest.rpartition(":")
        if scheme == "unix" and rest.startswith("/"):
            return cls(path=rest)
        if scheme == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 65536:
            return cls(host=host.removeprefix("[").removesuffix("]"), port=int(port))
        raise ValueError(f"address is {text!r}; give unix:/absolute/path or tcp:host:port")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
