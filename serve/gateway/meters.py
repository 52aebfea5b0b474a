"""What one generation adds to the metrics and to its line in the log. Names and labels: `serve/metrics.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from serve.events import DenoiseProgress, ImagePreview
from serve.gateway.choices import Piece
from serve.gateway.context import RequestContext
from serve.gateway.image_generation import ImageDone, ImagePiece
from serve.gateway.promises import Promises
from serve.gateway.telemetry import outcome_of
from serve.gateway.text_generation import TextGeneration
from serve.recorder import Recorder
from serve.request import ImageRequest, ModelCard


class TextMeter:
    """Tokens and their times, all prompts and choices."""

    def __init__(
        self, recorder: Recorder, card: ModelCard, context: RequestContext, generation: TextGeneration
    ) -> None:
        recorder.admit(card.name)
        self._recorder = recorder
        self._model = card.name
        self._context = context
        self._generation = generation
        self._promises = Promises(recorder, card)
        self._itl = recorder.cell("tandem_inter_token_latency_seconds", model=card.name)
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._num_seen = 0

    def accepted(self) -> None:
        num_prompt_tokens = self._generation.tokens().prompt
        self._context.figures |= {"prompt_tokens": num_prompt_tokens, "output_tokens": 0}
        self._count("tandem_prompt_tokens_total", num_prompt_tokens)
        self._observe("tandem_request_prompt_tokens", num_prompt_tokens)

    def saw(self, pieces: Sequence[Piece]) -> None:
        now = time.perf_counter()
        for piece in pieces:
            num_tokens = len(piece.token_ids)
            if not num_tokens:
                continue
            self._num_seen += num_tokens
            last = self._last.get(piece.index)
            self._last[piece.index] = now
            if last is not None:
                self._itl.observe((now - last) / num_tokens, num_tokens)
            elif self._first is None:
                self._first = now
                self._observe("tandem_time_to_first_token_seconds", now - self._context.started)

    def ended(self, error: BaseException | None) -> None:
        tokens = self._generation.tokens()
        self._context.figures["output_tokens"] = tokens.completion
        self._context.figures |= {"cached_tokens": tokens.cached, "reasoning_tokens": tokens.reasoning}
        self._context.finish_reasons = self._generation.finish_reasons()
        self._count("tandem_output_tokens_total", tokens.completion)
        self._count("tandem_cached_tokens_total", tokens.cached)
        self._observe("tandem_request_output_tokens", tokens.completion)
        for direction, number in (("input", tokens.prompt), ("output", tokens.completion)):
            tenant = self._context.tenant_name
            self._recorder.count(
                "tandem_tenant_tokens_total", number, model=self._model, tenant=tenant, direction=direction
            )
        if self._first is None:
            self._promises.first_token(time.perf_counter() - self._context.started, error, has_come=False)
            return
        ttft_s = self._context.figures["ttft_s"] = self._first - self._context.started
        self._promises.first_token(ttft_s, error, has_come=True)
        if self._num_seen > 1:
            per_token = (max(self._last.values()) - self._first) / (self._num_seen - 1)
            self._observe("tandem_request_time_per_output_token_seconds", per_token)
            self._promises.later_tokens(per_token)

    def _count(self, name: str, value: float) -> None:
        self._recorder.count(name, value, model=self._model)

    def _observe(self, name: str, value: float) -> None:
        self._recorder.observe(name, value, model=self._model)


class ImageMeter:
    """Images and their steps."""

    def __init__(self, recorder: Recorder, card: ModelCard, context: RequestContext, request: ImageRequest) -> None:
        recorder.admit(card.name)
        self._recorder = recorder
        self._promises = Promises(recorder, card)
        self._context = context
        self._request = request
        self._steps = dict.fromkeys(range(request.n), 0)
        self._num_done = 0
        self._has_preview = False

    def accepted(self) -> None:
        self._context.figures |= {"images": self._request.n}

    def saw(self, pieces: Sequence[ImagePiece]) -> None:
        for piece in pieces:
            match piece:
                case DenoiseProgress(index, step):
                    self._steps[index] = step
                case ImageDone(index):
                    self._steps[index] = self._request.num_inference_steps
                    self._num_done += 1
                case ImagePreview() if not self._has_preview:
                    self._has_preview = True
                    since = time.perf_counter() - self._context.started
                    self._context.figures["first_preview_s"] = since
                    self._recorder.observe("tandem_time_to_first_preview_seconds", since, model=self._request.model)

    def ended(self, error: BaseException | None) -> None:
        num_steps = sum(self._steps.values())
        self._context.figures["steps"] = num_steps
        model, num_pixels = self._request.model, self._request.width * self._request.height
        self._recorder.count("tandem_image_steps_total", num_steps, model=model)
        self._recorder.count("tandem_image_pixel_steps_total", num_steps * num_pixels, model=model)
        self._recorder.count(
            "tandem_tenant_images_total", self._num_done, model=model, tenant=self._context.tenant_name
        )
        self._promises.image(time.perf_counter() - self._context.started, error)
        for outcome, number in (("success", self._num_done), (outcome_of(error), self._request.n - self._num_done)):
            if number:
                self._recorder.count("tandem_images_total", number, model=model, outcome=outcome)
