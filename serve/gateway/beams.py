"""The fields of beam search, in transformers' words and in vLLM's, as `BeamParams`.

`num_beams` above 1 asks for it, or vLLM's `use_beam_search`, where `n` alone is the number of beams, all returned.
"""

from __future__ import annotations

from typing import Any

from serve.errors import InvalidRequest
from serve.gateway.prompts import max_tokens_of
from serve.request import BeamParams

MOST_BEAMS = 64
"""Of one search: a step finds candidates for all of them, the search compares them all on the host."""
_MEANINGLESS = {"num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0, "early_stopping": False}
"""Without beams these ask for nothing; other values are a request that forgot to ask for beams."""


def beams_of(body: Any) -> BeamParams | None:
    """None: no beams. Raises InvalidRequest for fields that contradict each other; values are checked with the rest."""
    if body.use_beam_search is False and (body.num_beams or 1) > 1:
        raise InvalidRequest(
            f"use_beam_search is false and num_beams {body.num_beams}; leave one out", param="use_beam_search"
        )
    if not body.use_beam_search and (body.num_beams or 1) == 1:
        for name, meaningless in _MEANINGLESS.items():
            if getattr(body, name) not in (None, meaningless):
                raise InvalidRequest(f"{name} belongs to beam search; send num_beams above 1 as well", param=name)
        return None
    if body.stop:
        raise InvalidRequest("stop strings cannot end beams, which are token ids; use stop_token_ids", param="stop")
    if max_tokens_of(body) == 0:
        raise InvalidRequest("max_tokens is 0; beams need at least 1", param="max_tokens")
    num_beams = body.num_beams or body.n or 1
    if num_beams > MOST_BEAMS:
        raise InvalidRequest(f"n is {num_beams}; a search has at most {MOST_BEAMS} beams", param="n")
    return BeamParams(
        num_beams=num_beams,
        num_beam_groups=body.num_beam_groups or 1,
        diversity_penalty=body.diversity_penalty or 0.0,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        early_stopping=body.early_stopping or False,
    )
