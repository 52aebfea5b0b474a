"""Everything an image request generates: one backend request, read as progress, previews and finished images."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.backend import EventStream
from serve.errors import InvalidRequest, ReplicaLost
from serve.events import DenoiseProgress, Event, Finished, ImagePreview, ImageReady, Usage
from serve.request import ImageRequest

Submit = Callable[[ImageRequest], Awaitable[EventStream]]
Names = Mapping[str | None, str]
"""A field a replica may refuse → the one the client has used for it."""


@dataclass(frozen=True, slots=True)
class ImageDone:
    """A finished image, as an encoded file, and what it used."""

    index: int
    data: bytes
    usage: Usage


ImagePiece = DenoiseProgress | ImagePreview | ImageDone


class ImageGeneration:
    """Submit, read, close. `start` raises what a refusal raises; reading raises what a failure raises."""

    def __init__(self, request: ImageRequest, submit: Submit, names: Names) -> None:
        self._request = request
        self._submit = submit
        self._names = names
        self._stream: EventStream | None = None
        self._files: dict[int, bytes] = {}
        """Images whose `Finished` has not come yet."""

    async def start(self) -> None:
        """Return when the request is accepted."""
        try:
            self._stream = await self._submit(self._request)
        except InvalidRequest as refusal:
            refusal.param = self._names.get(refusal.param, refusal.param)
            raise

    async def pieces(self) -> AsyncGenerator[list[ImagePiece]]:
        """Lists of pieces until every image is finished. Close the iterator to cancel."""
        if self._stream is None:
            return
        missing = set(range(self._request.n))
        try:
            async for events in self._stream:
                pieces = self._take(events)
                missing -= {piece.index for piece in pieces if isinstance(piece, ImageDone)}
                if pieces:
                    yield pieces
                if not missing:
                    return
            raise ReplicaLost("the answer ended before it was complete; send the request again")
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is unfinished. At any time, more than once."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()

    def _take(self, events: Sequence[Event]) -> list[ImagePiece]:
        pieces: list[ImagePiece] = []
        for event in events:
            if isinstance(event, (DenoiseProgress, ImagePreview)):
                pieces.append(event)
            elif isinstance(event, ImageReady):
                self._files[event.index] = event.data
            elif isinstance(event, Finished) and event.index in self._files:
                pieces.append(ImageDone(event.index, self._files.pop(event.index), event.usage))
        return pieces
