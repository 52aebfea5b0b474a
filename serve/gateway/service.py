"""What the routes share: the collaborators of one gateway, and how a text request is answered."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from serve.errors import InvalidRequest
from serve.gateway import chat, completions, context
from serve.gateway.drain import Drain
from serve.gateway.exchange import Exchange, Prepared
from serve.gateway.generation import Generation
from serve.gateway.planning import Asked, Caller, plan
from serve.gateway.pool import Pool
from serve.gateway.prompts import Prompt, chat_prompts, completion_prompts
from serve.gateway.telemetry import Telemetry
from serve.gateway.usage import fingerprint
from serve.gateway.wire import Envelope, Format
from serve.options import GatewayOptions
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where chat and completions differ."""

    prompts: Callable[[Any, ModelCard, Tokenizer], Awaitable[tuple[Prompt, ...]]]
    asked: Callable[[Any], Asked]
    format: Callable[[Any, tuple[Prompt, ...], Tokenizer, Envelope], Format]
    prefix: str
    object: str
    chunk_object: str


CHAT = Endpoint(chat_prompts, chat.asked, chat.ChatFormat, "chatcmpl-", "chat.completion", "chat.completion.chunk")
COMPLETIONS = Endpoint(
    completion_prompts, completions.asked, completions.CompletionFormat, "cmpl-", "text_completion", "text_completion"
)


@dataclass(frozen=True, slots=True)
class Service:
    """The collaborators."""

    pool: Pool
    options: GatewayOptions
    telemetry: Telemetry
    drain: Drain

    def generate(self, http: Request, body: Any, endpoint: Endpoint) -> Exchange:
        """The answer to a checked chat or completions body."""
        about = context.of(http.scope)

        async def prepare() -> Prepared:
            card = self.text_model(body.model)
            about.model = card.name
            tokenizer = self.pool.tokenizer(card.name)
            prompts = await endpoint.prompts(body, card, tokenizer)
            caller = Caller(tenant=about.tenant, max_timeout_s=self.options.default_timeout_s)
            parts = plan(body, prompts, endpoint.asked(body), card, tokenizer, caller)
            shows = body.stream_options
            envelope = Envelope(
                id=endpoint.prefix + (body.request_id or about.request_id),
                object=endpoint.object,
                chunk_object=endpoint.chunk_object,
                created=int(time.time()),
                model=body.model or card.name,
                fingerprint=fingerprint(card),
                has_usage=bool(shows and shows.include_usage),
                has_running_usage=bool(shows and shows.include_usage and shows.continuous_usage_stats),
            )
            return Prepared(
                Generation(parts, self.pool.submit),
                endpoint.format(body, prompts, tokenizer, envelope),
                envelope,
                num_prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
                timeout_s=min(body.timeout or self.options.default_timeout_s, self.options.default_timeout_s),
            )

        return Exchange(
            prepare,
            is_stream=bool(body.stream),
            context=about,
            telemetry=self.telemetry,
            drain=self.drain,
            heartbeat_s=self.options.heartbeat_s,
        )

    def text_model(self, name: str | None) -> ModelCard:
        """The text model of that name. Raises ModelNotFound, Unavailable, InvalidRequest."""
        card = self.pool.find(name)
        if card.kind != "text":
            raise InvalidRequest(f"{card.name} is no text model (it makes {card.kind}s)", param="model")
        return card
