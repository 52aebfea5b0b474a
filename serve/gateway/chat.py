"""`/v1/chat/completions`: OpenAI's wire format, whole and in chunks.

role chunk · deltas · finish chunk, per choice … usage chunk when asked for · [DONE]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serve.errors import InvalidRequest
from serve.gateway.chat_message import StreamedCalls, whole_message
from serve.gateway.choices import Piece
from serve.gateway.parsing.events import Parsed, Reasoning
from serve.gateway.planning import Asked
from serve.gateway.prompts import Prompt, chat_prompt, encode_chat
from serve.gateway.reading import reading
from serve.gateway.structured import constraint
from serve.gateway.text_generation import TextGeneration
from serve.gateway.text_wire import Envelope
from serve.gateway.tool_use import tool_use
from serve.gateway.usage import Logprobs, usage
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer


async def ask(body: Any, card: ModelCard, tokenizer: Tokenizer) -> tuple[tuple[Prompt, ...], Asked]:
    """The prompt and what is asked of it. Raises InvalidRequest, also for what the chat template refuses."""
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    use = tool_use(body, card, tokenizer)
    grammar = constraint(body, tools=None if use is None else "tools")
    ids = await encode_chat(body, tokenizer, use.tools if use else None)
    read, behind = reading(
        card,
        tokenizer,
        use,
        ids,
        is_held=grammar is not None or (use is not None and use.is_forced),
        hides_special=body.skip_special_tokens is not False,
    )
    asked = Asked(
        default_max_tokens=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar if use is None else use.grammar(),
        reading=read,
    )
    return (chat_prompt([*ids, *behind], body, card),), asked


class ChatFormat:
    """Pieces of text as chat completion objects."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, body: Any, prompts: tuple[Prompt, ...], asked: Asked, tokenizer: Tokenizer, envelope: Envelope
    ) -> None:
        self._body = body
        self._prompt_ids = prompts[0].ids
        self._envelope = envelope
        self._logprobs = Logprobs(
            tokenizer, num_top=body.top_logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )
        last = body.messages[-1]
        self._opening = (last.content or "") if body.echo and last.role == "assistant" else ""
        self._reading = asked.reading
        self._opened: set[int] = set()
        self._calls: dict[int, StreamedCalls] = {}

    def chunks(self, piece: Piece, generation: TextGeneration) -> list[dict[str, Any]]:
        """The chunks of one piece. A piece without text gives none, unless something else is to be told."""
        chunks = []
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            first: dict[str, Any] = {} if len(self._opened) > 1 else self._prompt_token_ids()
            # Where calls may come, the answer may well have no content at all.
            opening = self._opening if self._opening or self._reading is None else None
            delta = {"role": "assistant", "content": opening, "refusal": None}
            chunks.append({**self._chunk(piece.index, delta, None), **first})
        deltas = self._deltas(piece)
        if not deltas and (piece.logprobs or (piece.token_ids and self._tells_tokens)):
            deltas = [{}] if self._reading else [{"content": ""}]
        chunks += [
            self._chunk(piece.index, delta, piece if number == 0 else None) for number, delta in enumerate(deltas)
        ]
        if piece.finish_reason is not None:
            finish = self._chunk(piece.index, {}, None)
            finish["choices"][0] |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
            if piece.score is not None:
                finish["choices"][0]["beam_score"] = piece.score
            chunks.append(finish)
        return chunks

    def whole(self, pieces: dict[int, list[Piece]], generation: TextGeneration) -> dict[str, Any]:
        """The answer, from all pieces by choice."""
        choices = []
        for index, own in sorted(pieces.items()):
            choice = {
                "index": index,
                "message": self._message(own),
                "logprobs": self._whole_logprobs(own),
                "finish_reason": own[-1].finish_reason,
                "stop_reason": own[-1].stop_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = [token_id for piece in own for token_id in piece.token_ids]
            if own[-1].score is not None:
                choice["beam_score"] = own[-1].score
            choices.append(choice)
        answer = {**self._envelope.answer(), "choices": choices, "usage": usage(generation.tokens())}
        if self._body.service_tier is not None:
            answer["service_tier"] = "default"
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._logprobs.prompt(generation.prompt_logprobs.get(0, ()))
        return {**answer, **self._prompt_token_ids()}

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        if self._reading is None:
            return [{"content": piece.text}] if piece.text else []
        calls = self._calls.setdefault(piece.index, StreamedCalls(self._reading.new_id))
        return calls.deltas(self._told(piece.parsed))

    def _message(self, pieces: list[Piece]) -> dict[str, Any]:
        if self._reading is None:
            content = self._opening + "".join(piece.text for piece in pieces)
            return {"role": "assistant", "content": content, "refusal": None}
        parsed = self._told(event for piece in pieces for event in piece.parsed)
        message = whole_message(parsed, self._reading.new_id)
        if self._opening:
            message["content"] = self._opening + (message["content"] or "")
        return message

    def _told(self, parsed: Iterable[Parsed]) -> list[Parsed]:
        """Without reasoning where it is not wanted."""
        hides = self._body.include_reasoning is False
        return [event for event in parsed if not (hides and isinstance(event, Reasoning))]

    @property
    def _tells_tokens(self) -> bool:
        return bool(self._body.return_token_ids) or self._envelope.has_running_usage

    def _whole_logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return self._logprobs.chat([entry for piece in pieces for entry in piece.logprobs])

    def _chunk(self, index: int, delta: dict[str, Any], piece: Piece | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if piece is not None and self._body.logprobs:
            choice["logprobs"] = self._logprobs.chat(piece.logprobs)
        if piece is not None and self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return {**self._envelope.chunk(), "choices": [choice]}

    def _prompt_token_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt_ids} if self._body.return_token_ids else {}
