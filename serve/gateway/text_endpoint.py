"""`/v1/chat/completions` and `/v1/completions`: from a checked body to requests with token ids."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from serve.gateway import chat, completions
from serve.gateway.choices import Piece
from serve.gateway.meters import TextMeter
from serve.gateway.planning import Asked, plan
from serve.gateway.pool import Pool
from serve.gateway.prepared import Prepared
from serve.gateway.prompts import Prompt
from serve.gateway.service import Caller
from serve.gateway.text_generation import TextGeneration
from serve.gateway.text_wire import Choices, Envelope, TextFormat
from serve.gateway.usage import fingerprint
from serve.recorder import Recorder
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where chat and completions differ."""

    ask: Callable[[Any, ModelCard, Tokenizer], Awaitable[tuple[tuple[Prompt, ...], Asked]]]
    """The prompts, and what is asked of each. Raises InvalidRequest."""
    choices: Callable[[Any, tuple[Prompt, ...], Asked, Tokenizer, Envelope], Choices]
    prefix: str
    object: str
    chunk_object: str


CHAT = Dialect(chat.ask, chat.ChatFormat, "chatcmpl-", "chat.completion", "chat.completion.chunk")
COMPLETIONS = Dialect(completions.ask, completions.CompletionFormat, "cmpl-", "text_completion", "text_completion")


class TextEndpoint:
    """Prepares text requests of one dialect."""

    kind = "text"

    def __init__(self, dialect: Dialect, pool: Pool, recorder: Recorder) -> None:
        self._dialect = dialect
        self._pool = pool
        self._recorder = recorder

    async def prepare(self, body: Any, card: ModelCard, caller: Caller) -> Prepared[Piece]:
        dialect = self._dialect
        tokenizer = self._pool.models.tokenizer(card.name)
        prompts, asked = await dialect.ask(body, card, tokenizer)
        parts = plan(body, prompts, asked, card, tokenizer, caller)
        shows = body.stream_options
        envelope = Envelope(
            id=dialect.prefix + (body.request_id or caller.context.request_id),
            object=dialect.object,
            chunk_object=dialect.chunk_object,
            created=int(time.time()),
            model=body.model or card.name,
            fingerprint=fingerprint(card),
            has_usage=bool(shows and shows.include_usage),
            has_running_usage=bool(shows and shows.include_usage and shows.continuous_usage_stats),
        )
        caller.context.response_id = envelope.id
        generation = TextGeneration(parts, self._pool.submit)
        return Prepared(
            generation,
            TextFormat(dialect.choices(body, prompts, asked, tokenizer, envelope), envelope, generation),
            TextMeter(self._recorder, card, caller.context, generation),
        )
