"""`/v1/completions`: OpenAI's older wire format, whole and in chunks, with `echo` and scored prompts."""

from __future__ import annotations

from typing import Any

from serve.events import TokenLogprobs
from serve.gateway.choices import Piece
from serve.gateway.planning import Asked
from serve.gateway.prompts import Prompt, completion_prompts
from serve.gateway.structured import constraint
from serve.gateway.text_generation import TextGeneration
from serve.gateway.text_wire import Envelope
from serve.gateway.usage import Logprobs, TextOffsets, usage
from serve.request import ModelCard
from serve.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""


async def ask(body: Any, card: ModelCard, tokenizer: Tokenizer) -> tuple[tuple[Prompt, ...], Asked]:
    """Prompts and what is asked of each. Raises InvalidRequest."""
    scored = body.prompt_logprobs
    if scored is None and body.echo:
        scored = body.logprobs
    asked = Asked(
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=scored,
        grammar=constraint(body),
    )
    return await completion_prompts(body, card, tokenizer), asked


class CompletionFormat:
    """Pieces of text as completion objects. With `echo` a choice begins with its prompt."""

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self, body: Any, prompts: tuple[Prompt, ...], asked: Asked, tokenizer: Tokenizer, envelope: Envelope
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._n = body.n or 1
        self._tokenizer = tokenizer
        self._envelope = envelope
        self._logprobs = Logprobs(
            tokenizer, num_top=body.logprobs or 0, as_token_ids=bool(body.return_tokens_as_token_ids)
        )
        self._opened: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    def chunks(self, piece: Piece, generation: TextGeneration) -> list[dict[str, Any]]:
        """The chunk of one piece, or none when it has nothing to tell."""
        is_first = piece.index not in self._opened
        self._opened.add(piece.index)
        opens = is_first and bool(self._body.echo)
        tells_tokens = piece.token_ids and (self._body.return_token_ids or self._envelope.has_running_usage)
        if not (piece.text or piece.logprobs or piece.finish_reason or opens or tells_tokens):
            return []
        choice = {
            "index": piece.index,
            "text": (self._echoed(piece.index) if opens else "") + piece.text,
            "logprobs": self._choice_logprobs(piece.index, [piece], generation, opens),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._prompt(piece.index).ids
        if piece.score is not None:
            choice["beam_score"] = piece.score
        return [{**self._envelope.chunk(), "choices": [choice]}]

    def whole(self, pieces: dict[int, list[Piece]], generation: TextGeneration) -> dict[str, Any]:
        """The answer, from all pieces by choice."""
        choices = []
        for index, own in sorted(pieces.items()):
            echoes = bool(self._body.echo)
            choice = {
                "index": index,
                "text": (self._echoed(index) if echoes else "") + "".join(piece.text for piece in own),
                "logprobs": self._choice_logprobs(index, own, generation, echoes),
                "finish_reason": own[-1].finish_reason,
                "stop_reason": own[-1].stop_reason,
            }
            if self._body.prompt_logprobs is not None:
                scored = generation.prompt_logprobs.get(index // self._n, ())
                choice["prompt_logprobs"] = self._logprobs.prompt(scored)
            if self._body.return_token_ids:
                choice["token_ids"] = [token_id for piece in own for token_id in piece.token_ids]
                choice["prompt_token_ids"] = self._prompt(index).ids
            if own[-1].score is not None:
                choice["beam_score"] = own[-1].score
            choices.append(choice)
        return {**self._envelope.answer(), "choices": choices, "usage": usage(generation.tokens())}

    def _choice_logprobs(
        self, index: int, pieces: list[Piece], generation: TextGeneration, with_prompt: bool
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        ids: list[int] = []
        entries: list[TokenLogprobs | None] = []
        offsets: list[int] = []
        if with_prompt:
            prompt = self._prompt(index)
            ids += prompt.ids
            entries += generation.prompt_logprobs.get(index // self._n, ())
            offsets += TextOffsets(self._tokenizer.detokenizer(skip_special_tokens=prompt.text is not None)).push(ids)
        for piece in pieces:
            ids += piece.token_ids
            entries += piece.logprobs
            offsets += self._answer_offsets(index).push(piece.token_ids)
        return self._logprobs.completion(ids, entries, offsets)

    def _answer_offsets(self, index: int) -> TextOffsets:
        """Of the choice's own tokens, behind the prompt when that is echoed."""
        if index not in self._offsets:
            own = self._tokenizer.detokenizer(skip_special_tokens=self._body.skip_special_tokens is not False)
            self._offsets[index] = TextOffsets(own, len(self._echoed(index)) if self._body.echo else 0)
        return self._offsets[index]

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self._n]

    def _echoed(self, index: int) -> str:
        prompt = self._prompt(index)
        return prompt.text if prompt.text is not None else self._tokenizer.decode(prompt.ids, skip_special_tokens=False)
