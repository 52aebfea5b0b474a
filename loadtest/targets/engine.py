"""Tandem's engines in this process, without HTTP, gateway or channel: what the model costs alone.

The engine's thread and the client share an interpreter here, so a load of many small steps is slower than it would be
behind a server. Prompts are cut into tokens by the model's tokenizer, without a chat template.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from itertools import count
from typing import Any

from loadtest.measure.outcome import Outcome
from loadtest.targets.target import Failed, Message, Spool
from loadtest.traffic.ask import Ask, ImageAsk, TextAsk
from loadtest.traffic.words import local_counter, local_tokenizer
from serve.backend import Backend
from serve.errors import TandemError
from serve.events import Event, Finished, ImagePreview, ImageReady, TokenDelta
from serve.options import ModelOptions
from serve.request import ImageRequest, SamplingParams, TextRequest


class InProcess:
    """A `Target` of a text engine, an image engine or both."""

    def __init__(self, *, text: str, image: str, sampling: dict[str, Any], ignore_eos: bool, spool: Spool):
        """Loads the models that have a name. Raises TandemError."""
        from serve.model_folder import find_model

        self._spool = spool
        self._numbers = count()
        self._ignore_eos = ignore_eos
        self._sampling = sampling
        self._text: Backend | None = None
        self._image: Backend | None = None
        if text:
            from serve.text.build import build_text

            folder = str(find_model(ModelOptions(model=text), "text")[0])
            self._encode, self._count = local_tokenizer(folder), local_counter(folder)
            self._text = build_text(ModelOptions(model=text), progress=False)
        if image:
            from serve.image.build import build_image

            self._image = build_image(ModelOptions(model=image))

    def prepare(self, ask: Ask, history: Sequence[Message] = ()) -> TextRequest | ImageRequest:
        name = f"loadtest-{next(self._numbers)}"
        return self._picture(ask, name) if isinstance(ask, ImageAsk) else self._continuation(ask, history, name)

    async def send(self, prepared: TextRequest | ImageRequest, outcome: Outcome, origin: float) -> None:
        backend = self._image if isinstance(prepared, ImageRequest) else self._text
        assert backend is not None
        try:
            async with aclosing(await backend.submit(prepared)) as stream:
                async for events in stream:
                    now = time.perf_counter() - origin
                    for event in events:
                        self._take(event, outcome, now)
        except TandemError as error:
            raise Failed(error.code) from None
        finally:
            outcome.end = time.perf_counter() - origin

    async def count_tokens(self, text: str) -> int:
        if self._text is None:
            raise Failed("an image model alone has no tokenizer here")
        return await self._count(text)

    async def is_there(self) -> bool:
        try:
            for backend in (self._text, self._image):
                if backend is not None:
                    await backend.check_health()
        except TandemError:
            return False
        return True

    async def queue_seconds(self) -> dict[str, float] | None:
        return None

    async def aclose(self) -> None:
        await asyncio.gather(*(backend.aclose() for backend in (self._text, self._image) if backend is not None))

    def _take(self, event: Event, outcome: Outcome, now: float) -> None:
        match event:
            case TokenDelta(_, token_ids):
                outcome.contents.append(now)
                outcome.output_tokens += len(token_ids)
            case ImagePreview():
                outcome.previews.append(now)
            case ImageReady(_, data):
                outcome.pictures.append(self._spool.put(data))
            case Finished(_, _, usage) if isinstance(outcome.ask, TextAsk):
                outcome.prompt_tokens, outcome.output_tokens = usage.prompt_tokens, usage.completion_tokens
                outcome.cached_tokens = usage.cached_tokens

    def _continuation(self, ask: TextAsk, history: Sequence[Message], name: str) -> TextRequest:
        if self._text is None:
            raise Failed("no text model was named; give --model")
        text = "\n".join([*(message["content"] for message in history), ask.prompt])
        given = {
            key: self._sampling[key] for key in ("temperature", "top_p", "top_k", "min_p") if key in self._sampling
        }
        sampling = SamplingParams(max_tokens=ask.num_output, seed=ask.seed, ignore_eos=self._ignore_eos, **given)
        ids = tuple(self._encode(text))
        return TextRequest(request_id=name, model=self._text.card.name, prompt_token_ids=ids, sampling=sampling)

    def _picture(self, ask: ImageAsk, name: str) -> ImageRequest:
        if self._image is None or self._image.card.image is None:
            raise Failed("no image model was named; give --image-model")
        limits = self._image.card.image
        return ImageRequest(
            request_id=name,
            model=self._image.card.name,
            prompt=ask.prompt,
            width=ask.width or limits.width,
            height=ask.height or limits.height,
            num_inference_steps=ask.num_steps or limits.num_inference_steps,
            guidance_scale=limits.guidance_scale if ask.guidance is None else ask.guidance,
            solver=limits.solvers[0],
            seed=ask.seed or 0,
            n=ask.num_images,
            num_previews=ask.num_previews,
        )
