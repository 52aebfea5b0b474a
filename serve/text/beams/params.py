"""What a beam request may ask for. The gateway checks it before a replica is asked, the engine for all others."""

from __future__ import annotations

import math

from serve.errors import InvalidRequest
from serve.request import BeamParams, SamplingParams

MOST_LENGTH_PENALTY = 4.0
"""Either way: a context's length to this power is a number in float32, and nobody has use for more."""


def check_beams(sampling: SamplingParams, beams: BeamParams, *, num_returned: int) -> None:
    """Raise `InvalidRequest` for values out of range and for what a search cannot be combined with."""
    for is_fine, param, message in (
        (beams.num_beams >= 1, "num_beams", f"num_beams is {beams.num_beams}; it must be at least 1"),
        (
            beams.num_beam_groups >= 1 and beams.num_beams % max(beams.num_beam_groups, 1) == 0,
            "num_beam_groups",
            f"num_beam_groups is {beams.num_beam_groups} and does not divide num_beams, which is {beams.num_beams}; "
            f"groups have equally many beams",
        ),
        (
            (beams.diversity_penalty > 0) == (beams.num_beam_groups > 1) and math.isfinite(beams.diversity_penalty),
            "diversity_penalty",
            f"diversity_penalty is {beams.diversity_penalty:g} and num_beam_groups {beams.num_beam_groups}; at least 2 "
            f"groups and a penalty above 0 go together",
        ),
        (
            abs(beams.length_penalty) <= MOST_LENGTH_PENALTY,
            "length_penalty",
            f"length_penalty is {beams.length_penalty:g}; use -{MOST_LENGTH_PENALTY:g} to {MOST_LENGTH_PENALTY:g}",
        ),
        (
            num_returned <= beams.num_beams,
            "n",
            f"n is {num_returned}, more than num_beams, which is {beams.num_beams}; a search returns at most its beams",
        ),
        (
            sampling.max_tokens >= 1,
            "max_tokens",
            f"max_tokens is {sampling.max_tokens}; beams need at least 1",
        ),
        (
            sampling.temperature in (0.0, 1.0),
            "temperature",
            f"temperature is {sampling.temperature:g}; beam search draws nothing, leave it out or send 0",
        ),
        (sampling.top_p == 1.0, "top_p", _draws_nothing("top_p", sampling.top_p)),
        (sampling.top_k == 0, "top_k", _draws_nothing("top_k", sampling.top_k)),
        (sampling.min_p == 0.0, "min_p", _draws_nothing("min_p", sampling.min_p)),
        (
            beams.num_beam_groups == 1 or sampling.repetition_penalty == 1.0,
            "repetition_penalty",
            "repetition_penalty cannot be combined with num_beam_groups: it would scale diversity_penalty as well; use "
            "frequency_penalty or presence_penalty",
        ),
        (
            sampling.logprobs is None or (sampling.logprobs == 0 and not _is_reshaped(sampling, beams)),
            "logprobs",
            "beams tell log-probabilities of the chosen tokens only, and none where logit_bias, penalties or groups "
            "change them; ask for logprobs without alternatives, or leave it out",
        ),
    ):  # fmt: skip
        if not is_fine:
            raise InvalidRequest(message, param=param)


def _draws_nothing(name: str, value: float) -> str:
    return f"{name} is {value:g}; beam search draws nothing, leave it out"


def _is_reshaped(sampling: SamplingParams, beams: BeamParams) -> bool:
    """Whether the search adds up other numbers than the model's log-probabilities."""
    return sampling.needs_history or bool(sampling.logit_bias) or beams.num_beam_groups > 1
