"""What a backend answers: frozen, plain values. A stream is lists of events, with one `Finished` per choice or image.

Text comes as token ids, which the gateway turns into text; images come as the bytes of a PNG, JPEG or WebP file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a job ended. ERROR and DEADLINE reach the caller as exceptions, CANCELLED reaches nobody."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's raw distribution (before penalties, temperature and masks)."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one choice, in order. `logprobs` has one entry a token, or is None when not asked for."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached: int | None = None
    """Prompt tokens found in the prefix cache; told with the choice's first tokens only. A caller that cancels (a stop
    string) never sees `Finished` and still owes its client the usage."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens; the first has none. Sent once, before the first token."""

    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class DenoiseProgress:
    """`step` of `num_steps` denoise steps of image `index` are done. A slow reader gets only the latest."""

    index: int
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class ImagePreview:
    """An estimate of the finished image (the model's x0 at this step, decoded) as an encoded file."""

    index: int
    number: int
    """0-based, of the request's `num_previews`."""
    step: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ImageReady:
    """The finished image `index` as an encoded file. Its `Finished` follows."""

    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one choice, the end token included. `cached_tokens` of the prompt were found in the prefix cache;
    `accepted_tokens` of the completion were drafts (speculation), and `rejected_tokens` more were drafted in vain.

    Of an image: the prompt's text tokens, and the latent tokens (patches) that its transformer sees in one row.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of choice or image `index`, exactly once."""

    index: int
    reason: FinishReason
    usage: Usage
    stop_token_id: int | None = None
    """The stop or end token that ended it, when one of the request's `stop_token_ids` or the model's own did. It is no
    text, so it comes here and not in a delta."""
    stop_logprobs: TokenLogprobs | None = None
    """Of that token, when asked for: clients that score answers count on one entry a sampled token."""
    score: float | None = None
    """Of a beam's output: its sum of log-probabilities over length ** length_penalty."""


Event = TokenDelta | PromptScored | Finished | DenoiseProgress | ImagePreview | ImageReady
