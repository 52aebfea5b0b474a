"""What has arrived of one request's answer: enough to ask another replica for the rest, and to pass on only the rest.

Tokens that were drawn with a key of seed and position go on where they stopped. What has no such state to go on from
(beams, images) is computed from its beginning again, and what has been passed on is taken out of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, TypeVar

from serve.events import DenoiseProgress, Event, Finished, ImagePreview, ImageReady, PromptScored, TokenDelta
from serve.request import ImageRequest, ModelCard, Request, TextRequest

T = TypeVar("T")


class Delivered(Protocol):
    """Of one request."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the stream's end is missing."""
        ...

    @property
    def has_begun(self) -> bool:
        """Whether anything has been passed on that another model would have told otherwise."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether the rest fits what has been passed on."""
        ...

    def take(self, events: list[Event]) -> list[Event]:
        """Those that are to be passed on, maybe none."""
        ...

    def rest(self) -> Request:
        """The request for what is missing. Events from now on are those of its answer."""
        ...


def delivered(request: Request, card: ModelCard) -> Delivered:
    return DeliveredText(request, card) if isinstance(request, TextRequest) else DeliveredImages(request)


class DeliveredText:
    """Tokens per choice, and which choices have ended."""

    def __init__(self, request: TextRequest, card: ModelCard) -> None:
        self._request = request
        sampling = request.sampling
        self._is_reproducible = card.is_reproducible or sampling.is_greedy or sampling.beams is not None
        self._tokens: list[list[int]] = [[] for _ in range(request.n)]
        self._num_cached: list[int | None] = [None] * request.n
        """As the choice's first replica told it."""
        self._ended: set[int] = set()
        self._is_scored = False
        self._has_moved = False
        self._num_known: list[int] = [0] * request.n
        """Tokens that the present replica will give again (beams)."""

    @property
    def is_complete(self) -> bool:
        return len(self._ended) == self._request.n

    @property
    def has_begun(self) -> bool:
        return bool(self._ended) or any(self._tokens) or self._is_scored

    @property
    def is_exact(self) -> bool:
        return self._is_reproducible or not (self._ended or any(self._tokens))

    def take(self, events: list[Event]) -> list[Event]:
        if self._has_moved:
            events = [kept for event in events if (kept := self._unknown(event)) is not None]
        for event in events:
            if isinstance(event, TokenDelta):
                self._tokens[event.index] += event.token_ids
                if event.num_cached is not None:
                    self._num_cached[event.index] = event.num_cached
            elif isinstance(event, Finished):
                self._ended.add(event.index)
            elif isinstance(event, PromptScored):
                self._is_scored = True
        return events

    def rest(self) -> TextRequest:
        self._has_moved = True
        request = self._request
        if self._is_scored:
            request = replace(request, prompt_logprobs=None)
        if request.sampling.beams is not None:
            self._num_known = [len(tokens) for tokens in self._tokens]
            return request
        if not (self._ended or any(self._tokens)):
            return request
        generated = (None if i in self._ended else tuple(tokens) for i, tokens in enumerate(self._tokens))
        return replace(request, generated=tuple(generated))

    def _unknown(self, event: Event) -> Event | None:
        """What of an event has not been passed on. The first replica's word on the prefix cache stays."""
        if isinstance(event, TokenDelta):
            num_known = min(self._num_known[event.index], len(event.token_ids))
            self._num_known[event.index] -= num_known
            if num_known == len(event.token_ids):
                return None
            is_told = self._num_cached[event.index] is not None
            return replace(
                event,
                token_ids=event.token_ids[num_known:],
                logprobs=None if event.logprobs is None else event.logprobs[num_known:],
                num_cached=None if is_told else event.num_cached,
            )
        if isinstance(event, Finished):
            num_cached = self._num_cached[event.index]
            if event.index in self._ended:
                return None
            return event if num_cached is None else replace(event, usage=replace(event.usage, cached_tokens=num_cached))
        return None if isinstance(event, PromptScored) and self._is_scored else event


class DeliveredImages:
    """Finished images, and how far the others have shown themselves: nothing a client sees goes backwards."""

    def __init__(self, request: ImageRequest) -> None:
        self._request = request
        self._ended: set[int] = set()
        self._ready: set[int] = set()
        self._steps: dict[int, int] = {}
        self._previews: set[tuple[int, int]] = set()

    @property
    def is_complete(self) -> bool:
        return len(self._ended) == self._request.n

    @property
    def has_begun(self) -> bool:
        return bool(self._previews or self._ready or self._ended)

    @property
    def is_exact(self) -> bool:
        return True

    def take(self, events: list[Event]) -> list[Event]:
        return [event for event in events if self._is_new(event)]

    def rest(self) -> ImageRequest:
        return replace(self._request, delivered=tuple(sorted(self._ended)))

    def _is_new(self, event: Event) -> bool:
        """Whether it has not been passed on; from now on it has."""
        if isinstance(event, DenoiseProgress):
            is_new = event.step > self._steps.get(event.index, 0)
            self._steps[event.index] = max(event.step, self._steps.get(event.index, 0))
            return is_new
        if isinstance(event, ImagePreview):
            return _add(self._previews, (event.index, event.number))
        if isinstance(event, ImageReady):
            return _add(self._ready, event.index)
        return not isinstance(event, Finished) or _add(self._ended, event.index)


def _add(seen: set[T], value: T) -> bool:
    """Whether it was not there yet."""
    is_new = value not in seen
    seen.add(value)
    return is_new
