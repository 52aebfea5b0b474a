"""From a checked body and its prompts to backend requests: sampling parameters, seeds, choices.

A value is the request's own, else the model's (`generation_config.json`, as in vLLM), else OpenAI's default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import InvalidRequest
from serve.gateway.beams import beams_of
from serve.gateway.choices import Choice, TextOptions
from serve.gateway.prompts import Prompt, max_tokens_of, room_for
from serve.gateway.reading import Reading
from serve.gateway.service import Caller
from serve.gateway.text_generation import Part
from serve.request import BeamParams, Grammar, ModelCard, SamplingParams, TextRequest
from serve.text.beams.params import check_beams
from serve.text.tokenizer import Tokenizer

MAX_CHOICES = 256
"""Of one HTTP request: n times prompts."""
_SEED_MASK = (1 << 64) - 1
_MODEL_DEFAULTS = {
    # field of generation_config.json: (OpenAI's default, least, most)
    "temperature": (1.0, 0.0, 2.0),
    "top_p": (1.0, 1e-6, 1.0),
    "top_k": (0.0, -1.0, 1e6),
    "min_p": (0.0, 0.0, 1.0),
    "repetition_penalty": (1.0, 1e-6, 10.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Where chat and completions differ."""

    default_max_tokens: int | None
    """None: what is left of the context."""
    logprobs: int | None
    prompt_logprobs: int | None
    grammar: Grammar | None = None
    """What the output must be."""
    reading: Reading | None = None
    """How calls and reasoning are found in it."""


def plan(
    body: Any, prompts: tuple[Prompt, ...], asked: Asked, card: ModelCard, tokenizer: Tokenizer, caller: Caller
) -> list[Part]:
    """What to submit. Choice indices run over the prompts: prompt number * n + i. Raises InvalidRequest."""
    n = body.n or 1
    _check(body, n * len(prompts), card)
    options = TextOptions(
        stops=body.stop or (),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        skip_special_tokens=body.skip_special_tokens is not False,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        discard=max_tokens_of(body) == 0,
        reading=asked.reading,
    )
    seed = body.seed if body.seed is not None else secrets.randbits(64)
    ends_itself = bool(options.stops) or (asked.reading is not None and asked.reading.ends_with_call)
    beams = beams_of(body)
    if beams is not None and ends_itself and n > 1:
        raise InvalidRequest(
            "parallel_tool_calls false cannot be combined with several beams' outputs; use n 1", param="n"
        )
    per_part = 1 if ends_itself else n
    parts = []
    for number, prompt in enumerate(prompts):
        sampling = _sampling(body, prompt, asked, card, tokenizer.generation_config, beams)
        if beams is not None:
            check_beams(sampling, beams, num_returned=n)
        for first in range(0, n, per_part):
            indices = range(number * n + first, number * n + first + per_part)
            request = TextRequest(
                request_id=uuid.uuid4().hex,
                model=card.name,
                prompt_token_ids=prompt.ids,
                sampling=dataclasses.replace(sampling, seed=(seed + first) & _SEED_MASK),
                n=per_part,
                prompt_logprobs=asked.prompt_logprobs,
                priority=-(body.priority or 0),
                timeout_s=caller.timeout_s,
                cache_salt=_salt(caller.context.tenant, body.cache_salt),
                session=_session(body),
                traceparent=caller.context.traceparent,
                tracestate=caller.context.tracestate,
            )
            parts.append(Part(request, number, tuple(Choice(index, tokenizer, options) for index in indices)))
    return parts


def _check(body: Any, num_choices: int, card: ModelCard) -> None:
    if num_choices > MAX_CHOICES:
        raise InvalidRequest(f"n times the prompts is {num_choices}; at most {MAX_CHOICES} are allowed", param="n")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available with stream; leave one out", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    for name, ids in (
        ("stop_token_ids", body.stop_token_ids or ()),
        ("logit_bias", [token_id for token_id, _ in body.logit_bias or ()]),
    ):
        if ids and max(ids) >= card.vocab_size:
            raise InvalidRequest(f"{name} names token {max(ids)}; {card.name} has {card.vocab_size}", param=name)


def _sampling(
    body: Any,
    prompt: Prompt,
    asked: Asked,
    card: ModelCard,
    defaults: Mapping[str, Any],
    beams: BeamParams | None,
) -> SamplingParams:
    """With beams the model's own way to draw has no say."""
    of_draws: Mapping[str, Any] = defaults if beams is None else {}
    room = room_for(prompt, body, card)
    wanted = max_tokens_of(body)
    max_tokens = max(1, wanted) if wanted is not None else min(room, asked.default_max_tokens or room)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}, above the most that may be generated ({max_tokens})", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_value(body, "temperature", of_draws),
        top_k=max(0, int(_value(body, "top_k", of_draws))),
        top_p=_value(body, "top_p", of_draws),
        min_p=_value(body, "min_p", of_draws),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_value(body, "repetition_penalty", defaults),
        logit_bias=body.logit_bias or (),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        logprobs=asked.logprobs,
        grammar=asked.grammar,
        beams=beams,
    )


def _value(body: Any, name: str, defaults: Mapping[str, Any]) -> float:
    given = getattr(body, name)
    if given is not None:
        return float(given)
    fallback, least, most = _MODEL_DEFAULTS[name]
    found = defaults.get(name)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not least <= found <= most:
        return fallback
    return float(found)


def _session(body: Any) -> str:
    """What the caller says belongs together, the narrowest first."""
    return body.session_id or getattr(body, "prompt_cache_key", None) or body.user or ""


def _salt(tenant: str, cache_salt: str | None) -> str:
    """Tenants never share prefixes; one may separate its own further."""
    if not tenant and not cache_salt:
        return ""
    return hashlib.sha256(f"{tenant}\0{cache_salt or ''}".encode()).hexdigest()[:32]
