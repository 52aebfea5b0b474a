"""A backend without a model, and a gateway over it: for tests of everything between HTTP and replicas.

`FakeBackend` answers with the tokens it is given, one list of events whenever its stream is read: a step. `gate` makes
the steps wait, `fail_after` and `refusal` make it fail. `gateway_image_fakes.py` has its sibling that draws.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from serve.backend import EventStream, Load
from serve.errors import Draining
from serve.events import Event, Finished, FinishReason, PromptScored, TokenDelta, TokenLogprobs, Usage
from serve.exposition import render
from serve.gateway.app import build_app
from serve.gateway.drain import Drain
from serve.gateway.hold import Hold
from serve.gateway.pool import Pool
from serve.options import GatewayOptions
from serve.prefix_view import PrefixView
from serve.recorder import Recorder
from serve.request import ModelCard, Request, TextRequest
from serve.wire import ReplicaEntry

EOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKERS = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
"""Special tokens that models write around calls."""
MERGES = ["t h", "th e", "i n", "a n", "an d", "Ġ the", "Ġ and", "e r", "o u", "Ġ a"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Call one as <tool_call>{"name": name, "arguments": object}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows tools, in the format of Hermes."""


@cache
def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with ten merges and a few special tokens (like `tiny.tiny_tokenizer`, without transformers)."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [(left, right) for left, right in map(str.split, MERGES)]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([EOS, START, END, *MARKERS])
    return made


@cache
def bundle(chat_template: str = CHAT_TEMPLATE) -> dict[str, bytes]:
    """The files of that tokenizer, without a folder."""
    config = {"eos_token": END, "pad_token": EOS, "chat_template": chat_template}
    return {"tokenizer.json": tokenizer().to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def card(name: str = "tiny", **fields: Any) -> ModelCard:
    values: dict[str, Any] = {
        "kind": "text", "source": "memory", "device": "cpu", "dtype": "float32", "num_parameters": 1000,
        "max_model_len": 256, "kv_cache_tokens": 4096, "vocab_size": tokenizer().get_vocab_size(), "threads": 1,
        "load_s": 0.1, "created": 1_700_000_000, "aliases": ("small",),
    }  # fmt: skip
    return ModelCard(name=name, **{**values, **fields})


def entry(
    replica_id: str, model: str = "tiny", address: str = "memory", kind: str = "text", fingerprint: str = ""
) -> ReplicaEntry:
    return ReplicaEntry(replica_id=replica_id, model=model, kind=kind, address=address, fingerprint=fingerprint)


@dataclass
class FakeBackend:
    """What `ChannelClient` is to the gateway."""

    reply: Sequence[int] | Callable[[TextRequest], Sequence[int]] = field(default_factory=lambda: ids("Hello there!"))
    card: ModelCard = field(default_factory=card)
    replica_id: str = "replica-0"
    is_alive: bool = True
    is_draining: bool = False
    refusal: Exception | None = None
    fail_after: tuple[int, Exception] | None = None
    """Raise this after so many events."""
    tokens_per_step: int = 1
    num_cached: int = 0
    end_id: int | None = None
    """The token that ends a reply shorter than `max_tokens`; told as engines tell it."""
    gate: asyncio.Event | None = None
    """Steps wait for it."""
    chat_template: str = CHAT_TEMPLATE
    requests: list[Any] = field(default_factory=list)
    open: set[FakeStream] = field(default_factory=set)
    num_cancelled: int = 0
    num_closed: int = 0
    prefixes: PrefixView = field(default_factory=PrefixView)
    unreported: Sequence[str] = ()
    turned_away: list[float] = field(default_factory=list)
    backlog_s: float | None = None
    """None: a second for each open stream."""

    @property
    def bundle(self) -> dict[str, bytes]:
        return bundle(self.chat_template)

    def script(self, request: Any) -> list[list[Event]]:
        """All events of a request, one list a step."""
        return _script(self, request, list(self.reply(request) if callable(self.reply) else self.reply))

    async def submit(self, request: Request) -> EventStream:
        if self.is_draining:
            raise Draining("going")
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(self, request)
        self.open.add(stream)
        return stream

    def load(self) -> Load:
        backlog_s = float(len(self.open)) if self.backlog_s is None else self.backlog_s
        return Load(running=len(self.open), backlog_s=backlog_s, job_s=1.0)

    def turn_away(self, work_s: float) -> None:
        self.turned_away.append(work_s)

    async def check_health(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    async def aclose(self) -> None:
        self.num_closed += 1


class FakeStream:
    """One accepted request."""

    def __init__(self, backend: FakeBackend, request: Request) -> None:
        self._backend = backend
        self._events = backend.script(request)
        self._num_read = 0

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> list[Event]:
        await asyncio.sleep(0)
        if self._backend.gate is not None:
            await self._backend.gate.wait()
        if self._backend.fail_after is not None and self._num_read >= self._backend.fail_after[0]:
            self._backend.open.discard(self)
            raise self._backend.fail_after[1]
        if not self._events:
            self._backend.open.discard(self)
            raise StopAsyncIteration
        self._num_read += 1
        events = self._events.pop(0)
        if not self._events:
            self._backend.open.discard(self)
        return events

    async def aclose(self) -> None:
        if self in self._backend.open:
            self._backend.open.discard(self)
            self._backend.num_cancelled += 1


def _script(backend: FakeBackend, request: TextRequest, reply: list[int]) -> list[list[Event]]:
    sampling, size = request.sampling, backend.tokens_per_step
    kept = reply[: sampling.max_tokens]
    reason = FinishReason.LENGTH if len(reply) >= sampling.max_tokens else FinishReason.STOP
    end_id = backend.end_id if reason is FinishReason.STOP else None
    num_sampled = len(kept) + (end_id is not None)
    usage = Usage(len(request.prompt_token_ids), num_sampled, backend.num_cached)
    is_scored = end_id is not None and sampling.logprobs is not None
    end_logprobs = scored(end_id, sampling.logprobs) if is_scored else None
    given = request.generated or ((),) * request.n
    rests = {index: kept[len(tokens) :] for index, tokens in enumerate(given) if tokens is not None}
    steps: list[list[Event]] = []
    for start in range(0, max(map(len, rests.values())), size):
        events: list[Event] = []
        for index, rest in rests.items():
            if new := tuple(rest[start : start + size]):
                logprobs = tuple(scored(token_id, sampling.logprobs) for token_id in new)
                cached = backend.num_cached if start == 0 else None
                told = logprobs if sampling.logprobs is not None else None
                events.append(TokenDelta(index, new, told, num_cached=cached))
        steps.append(events)
    steps = steps or [[]]
    if request.prompt_logprobs is not None:
        rest = request.prompt_token_ids[1:]
        entries = (None, *(scored(token_id, request.prompt_logprobs) for token_id in rest))
        steps[0].insert(0, PromptScored(entries))
    steps[-1] += [Finished(index, reason, usage, end_id, end_logprobs) for index in rests]
    return steps


def scored(token_id: int, num_top: int | None) -> TokenLogprobs:
    """The token at one half, then its neighbours; infinitely unlikely ones too."""
    top = [(token_id, math.log(0.5)), ((token_id + 1) % 256, -2.0), ((token_id + 2) % 256, -math.inf)]
    return TokenLogprobs(token_id, math.log(0.5), 1, tuple(top[: num_top or 0]))


@dataclass
class FakeGateway:
    """The application over fake replicas, without a socket."""

    app: Any
    pool: Pool
    drain: Drain
    recorder: Recorder
    backends: list[FakeBackend]

    @property
    def backend(self) -> FakeBackend:
        return self.backends[0]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels."""
        total = 0.0
        for line in render([self.recorder.snapshot()]).splitlines():
            if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


@contextlib.asynccontextmanager
async def fake_gateway(*backends: FakeBackend, hold: Hold | None = None, **options: Any) -> AsyncIterator[FakeGateway]:
    """A gateway over `backends` (one by default), all joined; none yet where models are held."""
    replicas = list(backends) or [FakeBackend()]
    by_id = {replica.replica_id: replica for replica in replicas}

    async def connect(entry: Any, on_lost: Callable[[], None]) -> FakeBackend:
        return by_id[entry.replica_id]

    recorder = Recorder("gateway-0", "gateway")
    pool = Pool(connect, recorder=recorder, hold=hold, max_wait_s=options.get("max_wait_s"))
    if hold is None:
        pool.update([entry(replica.replica_id, replica.card.name, kind=replica.card.kind) for replica in replicas])
        await joined(pool, len(replicas))
    drain = Drain()

    async def metrics() -> str:
        return render([recorder.snapshot()])

    app = build_app(pool, GatewayOptions(**options), recorder, metrics, drain=drain)
    try:
        yield FakeGateway(app, pool, drain, recorder, replicas)
    finally:
        await pool.aclose()


async def joined(pool: Pool, num_replicas: int) -> None:
    """Wait until so many replicas are up."""
    async with asyncio.timeout(10):
        while sum(member.remote is not None for member in pool._members.values()) < num_replicas:
            await asyncio.gather(*(member.joining for member in pool._members.values() if member.joining))


@dataclass
class Reply:
    """What an ASGI application sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    is_complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def json(self) -> Any:
        return json.loads(self.body)

    def data(self) -> list[str]:
        """The payloads of the server-sent events."""
        return [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")]

    def names(self) -> list[str]:
        """The names of the server-sent events that have one."""
        return [line.removeprefix("event: ") for line in self.body.decode().split("\n") if line.startswith("event: ")]

    def chunks(self) -> list[Any]:
        return [json.loads(text) for text in self.data() if text != "[DONE]"]


class Client:
    """Drives an ASGI application by hand: sees every part as it is sent, and can leave at any time."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.reply = Reply()
        self.left = asyncio.Event()
        self.sent = asyncio.Condition()

    async def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request and return the answer when it is complete (or the client has left)."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        fields = {"host": "localhost", "content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 5), "state": {},
            "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in fields.items()],
        }  # fmt: skip
        messages = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            async with self.sent:
                if message["type"] == "http.response.start":
                    self.reply.status = message["status"]
                    self.reply.headers = {key.decode(): value.decode() for key, value in message["headers"]}
                else:
                    self.reply.parts.append(message.get("body", b""))
                    self.reply.is_complete = not message.get("more_body", False)
                self.sent.notify_all()

        await self._app(scope, receive, send)
        return self.reply

    async def until(self, condition: Callable[[Reply], bool]) -> None:
        async with asyncio.timeout(10), self.sent:
            await self.sent.wait_for(lambda: condition(self.reply))


async def call(gateway: FakeGateway, path: str, body: Any = None, **options: Any) -> Reply:
    method = options.pop("method", "GET" if body is None else "POST")
    return await Client(gateway.app).request(method, path, body, **options)
