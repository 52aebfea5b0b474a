"""Prompts of a request as token ids: encoded, cut where asked, checked against the model. Long texts go to a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import ContextTooLong, InvalidRequest
from serve.gateway.tools import Tool
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer

THREAD_CHARS = 4096
"""Texts beyond are tokenized in a thread; shorter ones take well under a millisecond."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its ids, and the text they came from (None when ids were given)."""

    ids: tuple[int, ...]
    text: str | None


def chat_prompt(ids: list[int], body: Any, card: ModelCard) -> Prompt:
    """The prompt of a conversation from its ids (`encode_chat`). Raises InvalidRequest."""
    return _fitted(ids, None, body, card)


async def completion_prompts(body: Any, card: ModelCard, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The prompts of a completions request. Raises InvalidRequest."""
    special = body.add_special_tokens is not False
    prompts = []
    for prompt in body.prompt:
        is_text = isinstance(prompt, str)
        ids = await encode_text(prompt, tokenizer, add_special_tokens=special) if is_text else prompt
        prompts.append(_fitted(ids, prompt if is_text else None, body, card))
    return tuple(prompts)


async def encode_text(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[int]:
    """Ids of a user's text."""
    return await _encode(len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))


async def encode_chat(body: Any, tokenizer: Tokenizer, tools: Sequence[Tool] | None) -> list[int]:
    """Ids of a conversation through the model's template. `body`: a chat or a tokenize request.

    Raises InvalidRequest, also for what the chat template refuses.
    """
    messages = [message.for_template() for message in body.messages]
    kwargs = dict(body.chat_template_kwargs or {})
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None:
        kwargs = {"reasoning_effort": effort, "enable_thinking": effort != "none", **kwargs}
    continues = bool(body.continue_final_message)
    opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    definitions = [tool.definition for tool in tools] if tools else None
    return await _encode(
        sum(message.num_chars for message in body.messages) + len(str(definitions)),
        lambda: tokenizer.encode_chat(
            messages,
            tools=definitions,
            add_generation_prompt=opens,
            continue_final_message=continues,
            template_kwargs=kwargs,
        ),
    )


async def _encode(num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
    return encode() if num_chars <= THREAD_CHARS else await asyncio.to_thread(encode)


def _fitted(ids: list[int], text: str | None, body: Any, card: ModelCard) -> Prompt:
    """The prompt after `truncate_prompt_tokens`, with ids the model knows. The text goes when it is no longer whole."""
    if not ids:
        raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
    if max(ids) >= card.vocab_size:
        raise InvalidRequest(
            f"the prompt holds token id {max(ids)}; {card.name} has {card.vocab_size} tokens", param="prompt"
        )
    keep = body.truncate_prompt_tokens
    if keep == 0:
        raise InvalidRequest("truncate_prompt_tokens is 0; give at least 1, or -1", param="truncate_prompt_tokens")
    if keep == -1:
        keep = card.max_model_len - max(1, max_tokens_of(body) or 1)
    if keep is not None and 0 < keep < len(ids):
        ids, text = (ids[:keep] if body.truncation_side == "right" else ids[-keep:]), None
    return Prompt(tuple(ids), text)


def max_tokens_of(body: Any) -> int | None:
    """What the request asks for; a chat's newer name wins."""
    newer = getattr(body, "max_completion_tokens", None)
    return newer if newer is not None else body.max_tokens


def room_for(prompt: Prompt, body: Any, card: ModelCard) -> int:
    """Positions left for the answer. Raises ContextTooLong, with both numbers, when they are too few."""
    room = card.max_model_len - len(prompt.ids)
    wanted = max_tokens_of(body)
    if room < max(1, wanted or 1):
        name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) is not None else "max_tokens"
        asked = f"and {name} is {wanted}, " if wanted is not None else "and needs one more for its answer, "
        raise ContextTooLong(
            f"the prompt has {len(prompt.ids)} tokens {asked}together more than the {card.max_model_len} positions of "
            f"{card.name}; shorten the prompt" + (f" or lower {name}" if wanted is not None and wanted > 1 else ""),
            param="messages" if hasattr(body, "messages") else "prompt",
        )
    return room
