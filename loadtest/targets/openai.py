"""A server that speaks OpenAI's HTTP API: Tandem, vLLM, SGLang, OpenAI itself.

Text is streamed from /v1/chat/completions or /v1/completions. Images come from /v1/images/generations, whole, or
streamed where previews are wanted. What is not asked for by a flag is not sent: servers differ in what they take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.client import EventReader, HttpError, Server
from loadtest.measure.outcome import Outcome
from loadtest.targets.target import Failed, Message, Spool
from loadtest.traffic.ask import Ask, ImageAsk, TextAsk

IMAGES = "/v1/images/generations"
QUEUE_METRICS = (
    "tandem_request_queue_time_seconds_sum",
    "vllm:request_queue_time_seconds_sum",
    "sglang:queue_time_seconds_sum",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What every request of a run has in common."""

    model: str = ""
    image_model: str = ""
    endpoint: str = "/v1/chat/completions"
    ignore_eos: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    """temperature, top_p and their kin, as given."""
    extra_body: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")


class OpenAIServer:
    """A `Target` over HTTP."""

    def __init__(self, server: Server, protocol: Protocol, spool: Spool):
        self._server = server
        self._protocol = protocol
        self._spool = spool

    def prepare(self, ask: Ask, history: Sequence[Message] = ()) -> bytes:
        fields = self._image(ask) if isinstance(ask, ImageAsk) else self._text(ask, history)
        return json.dumps({**fields, **self._protocol.extra_body}).encode()

    async def send(self, prepared: bytes, outcome: Outcome, origin: float) -> None:
        answer: _Answer
        if isinstance(outcome.ask, ImageAsk):
            path = IMAGES
            answer = _ImageAnswer(outcome, origin, self._spool)
        else:
            path = self._protocol.endpoint
            answer = _TextAnswer(outcome, origin)
        try:
            await self._server.post(path, prepared, answer.feed)
        except HttpError as error:
            raise Failed(str(error), is_rejected=error.status == 429, is_lost=error.status == 0) from None
        finally:
            outcome.end = time.perf_counter() - origin
        answer.finish()

    async def count_tokens(self, text: str) -> int:
        """By the server's own /tokenize, which vLLM, SGLang and Tandem have."""
        try:
            fields = {"model": self._protocol.model, "prompt": text, "add_special_tokens": False}
            answer = await self._server.post_json("/tokenize", fields)
            return int(answer["count"])
        except (HttpError, ValueError, KeyError, TypeError) as error:
            raise Failed(f"/tokenize: {error}") from None

    async def count_chat_tokens(self, messages: Sequence[Message]) -> int:
        """Of a conversation under the model's chat template."""
        try:
            fields = {"model": self._protocol.model, "messages": list(messages)}
            return int((await self._server.post_json("/tokenize", fields))["count"])
        except (HttpError, ValueError, KeyError, TypeError) as error:
            raise Failed(f"/tokenize: {error}") from None

    async def is_there(self) -> bool:
        return await self._server.is_listening()

    async def queue_seconds(self) -> dict[str, float] | None:
        try:
            text = await self._server.get("/metrics")
        except HttpError:
            return None
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(QUEUE_METRICS):
                labels, _, value = line.rpartition(" ")
                model = next(
                    (part.split('"')[1] for part in labels.split("model") if part.startswith(('="', '_name="'))), ""
                )
                found[model] = found.get(model, 0.0) + float(value)
        return found or None

    async def aclose(self) -> None:
        self._server.close()

    def _text(self, ask: TextAsk, history: Sequence[Message]) -> dict[str, Any]:
        protocol = self._protocol
        fields: dict[str, Any] = {"model": protocol.model, "seed": ask.seed, **protocol.sampling}
        if protocol.is_chat:
            fields["messages"] = [*history, {"role": "user", "content": ask.prompt}]
            fields["max_completion_tokens"] = ask.num_output
        else:
            fields["prompt"] = "\n".join([*(message["content"] for message in history), ask.prompt])
            fields["max_tokens"] = ask.num_output
        if protocol.ignore_eos:
            fields["ignore_eos"] = True
        return fields | {"stream": True, "stream_options": {"include_usage": True}}

    def _image(self, ask: ImageAsk) -> dict[str, Any]:
        size = f"{ask.width}x{ask.height}" if ask.width and ask.height else None
        streamed = {"stream": True, "partial_images": ask.num_previews} if ask.num_previews else {}
        fields = {
            "model": self._protocol.image_model,
            "prompt": ask.prompt,
            "n": ask.num_images if ask.num_images != 1 else None,
            "size": size,
            "num_inference_steps": ask.num_steps,
            "guidance_scale": ask.guidance,
            "seed": ask.seed,
            "negative_prompt": ask.negative_prompt,
            **streamed,
        }
        return {name: value for name, value in fields.items() if value is not None}


class _Answer:
    """Reads an answer as it comes."""

    def feed(self, now: float, piece: bytes) -> None: ...

    def finish(self) -> None:
        """Raises Failed when what has come is not an answer."""


class _TextAnswer(_Answer):
    def __init__(self, outcome: Outcome, origin: float):
        self._outcome = outcome
        self._origin = origin
        self._failure = ""
        self._is_complete = False
        self.feed = EventReader(self._event).feed  # type: ignore[method-assign]

    def finish(self) -> None:
        if self._failure:
            raise Failed(self._failure)
        if not self._is_complete:
            raise Failed("the stream ended without a finish_reason", is_lost=True)

    def _event(self, now: float, data: bytes) -> None:
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            self._failure = f"in the stream: {error.get('code') or error.get('message')}"
            return
        if usage := event.get("usage"):
            self._outcome.prompt_tokens = usage.get("prompt_tokens") or 0
            self._outcome.output_tokens = usage.get("completion_tokens") or 0
            self._outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in event.get("choices") or ():
            self._is_complete |= choice.get("finish_reason") is not None
            if text := _content(choice):
                self._outcome.contents.append(now - self._origin)
                self._outcome.text.append(text)


class _ImageAnswer(_Answer):
    def __init__(self, outcome: Outcome, origin: float, spool: Spool):
        assert isinstance(outcome.ask, ImageAsk)
        self._outcome = outcome
        self._origin = origin
        self._spool = spool
        self._pieces: list[bytes] = []
        self._failure = ""
        self._is_stream = bool(outcome.ask.num_previews)
        if self._is_stream:
            self.feed = EventReader(self._event).feed  # type: ignore[method-assign]

    def feed(self, now: float, piece: bytes) -> None:
        self._pieces.append(piece)

    def finish(self) -> None:
        if self._failure:
            raise Failed(self._failure)
        if not self._is_stream:
            self._outcome.pictures.append(self._spool.put(b"".join(self._pieces)))
        elif not self._outcome.pictures:
            raise Failed("the stream ended without an image", is_lost=True)

    def _event(self, now: float, data: bytes) -> None:
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            self._failure = f"in the stream: {error.get('code') or error.get('message')}"
        elif event["type"].endswith(".partial_image"):
            self._outcome.previews.append(now - self._origin)
        elif event["type"].endswith(".completed"):
            self._outcome.pictures.append(self._spool.put(data))


def _content(choice: dict[str, Any]) -> str:
    """The output in a chunk: text, reasoning or part of a call. A chunk that only names the role has none."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    return text or (json.dumps(delta["tool_calls"]) if delta.get("tool_calls") else "")
