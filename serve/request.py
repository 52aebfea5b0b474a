"""What is asked of a backend: frozen, plain values, safe to send to another process.

Text requests hold token ids. The gateway turns text into ids once (`serve/text/tokenizer.py`) and ids back into text,
so stop strings, chat templates and JSON never reach an engine. Image requests hold their prompt as text: each diffusion
model has text encoders, with tokenizers, of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What the output must be. Plain text: it is compiled in the replica, which knows the tokens.

    kind            source
    json_object     "": any JSON object
    json_schema     a JSON Schema, as JSON
    regex           a regular expression that matches the whole output
    choice          a JSON list of strings, one of which is the output
    grammar         a grammar in EBNF (GBNF, as llama.cpp and xgrammar write it) or Lark
    structural_tag  JSON {"triggers": [...], "structures": [{"begin", "schema", "end"}, ...]}: free text until a
                    trigger, then one of the structures that begin with it: `begin`, JSON by `schema`, `end`; and so
                    on. "at_least_one": true, the output begins with a structure; "stop_after_first": true, it ends
                    after one.
    """

    kind: GrammarKind
    source: str = ""
    is_compact: bool = False
    """JSON without any whitespace."""
    param: str = field(default="grammar", compare=False)
    """The request's field that asked for it, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamParams:
    """Search for likely outputs instead of drawing them. Names and meaning as in transformers.

    A hypothesis scores the sum of its tokens' log-probabilities, the end token's included, over length **
    `length_penalty`. `TextRequest.n` of the best are returned, at most `num_beams`.
    """

    num_beams: int
    num_beam_groups: int = 1
    """More than one: diverse beam search (Vijayakumar et al., 2018), in groups of equally many beams."""
    diversity_penalty: float = 0.0
    """What a token costs for every beam of an earlier group that chooses it in the same step."""
    length_penalty: float = 1.0
    """Above 0 long outputs gain, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """When `num_beams` hypotheses are finished. True: end. False: end when the best beam, were it finished now, would
    not beat the worst of them. "never": when it could not even with the best possible length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Names and meaning as in the OpenAI API and vLLM.

    Order of application: logit bias, minimum length (end tokens masked), grammar, penalties, temperature, min-p, top-k,
    top-p, then a Gumbel-max draw keyed by (seed, position). `temperature` 0 is greedy.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Presence and frequency count generated tokens only, as OpenAI defines them."""
    repetition_penalty: float = 1.0
    """Counts prompt and generated tokens (Keskar et al., 2019)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """Always concrete (64 bits): who accepts a request without a seed draws one, so that a replay is exact."""
    stop_token_ids: tuple[int, ...] = ()
    """End the generation; the stop token is reported in `Finished.stop_token_id` and not delivered as output."""
    ignore_eos: bool = False
    grammar: Grammar | None = None
    """Tokens that cannot continue the output by it are masked, before everything that filters."""
    beams: BeamParams | None = None
    """None: tokens are drawn. With beams nothing is: bias, minimum length and penalties change log-probabilities (after
    the softmax, as in transformers), what shapes a draw has no meaning."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many alternatives (0: only the chosen). None: nothing."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the processed logits depend on tokens generated before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """Generate `n` continuations of `prompt_token_ids`. Choice i draws from `sampling.seed + i`."""

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    prompt_logprobs: int | None = None
    """Report the log-probability of every prompt token and this many alternatives per position."""
    priority: int = 0
    """Larger runs earlier; waiting raises it slowly, so nobody starves."""
    timeout_s: float | None = None
    """From acceptance to the last token; None: no deadline."""
    cache_salt: str = ""
    """Prefixes are shared only between requests of equal salt (the tenant)."""
    generated: tuple[tuple[int, ...] | None, ...] = ()
    """Not empty: the request goes on where another replica left it. Per choice the tokens it has given so far, which
    are not given again; None: the choice has ended. `prompt_logprobs` is then None unless nothing has been given."""
    session: str = ""
    """Requests of one session go to one replica where nothing else decides. Empty: it belongs to none."""
    traceparent: str = ""
    tracestate: str = ""
    """The span that this is part of, as the W3C writes it; empty: nobody traces it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """Generate `n` images of `prompt`. Image i draws its noise from `seed + i`. Every value is concrete: who accepts a
    request fills in the model's defaults (`ModelCard.image`), so that a replay is exact and answers can echo them."""

    request_id: str
    model: str
    prompt: str
    """For a class-conditional model the name or the number of a class."""
    width: int
    height: int
    """Pixels."""
    num_inference_steps: int
    guidance_scale: float
    """Classifier-free guidance (Ho and Salimans, 2022); at 1 or below there is none and a step costs one row."""
    solver: str
    seed: int
    negative_prompt: str = ""
    n: int = 1
    num_previews: int = 0
    """Estimates of the finished image to send on the way, spread evenly over the steps."""
    output_format: str = "png"
    """"png", "jpeg" or "webp"."""
    output_compression: int = 100
    """Quality of JPEG and WebP in percent; PNG has no loss."""
    priority: int = 0
    timeout_s: float | None = None
    """From acceptance to the last image; None: no deadline."""
    delivered: tuple[int, ...] = ()
    """Images that another replica has finished, by index: they are not drawn again."""
    session: str = ""
    traceparent: str = ""
    tracestate: str = ""
    """As of a text request."""


Request = TextRequest | ImageRequest
"""What a `Backend` takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What an image model can be asked for, and what it does when not told."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    """Defaults; width and height in pixels."""
    size_multiple: int
    """Width and height are multiples of this."""
    max_pixels: int
    max_steps: int
    solvers: tuple[str, ...]
    """The first is the model's own."""
    sizes: tuple[tuple[int, int], ...] = ()
    """The only (width, height) there are; empty: any within the limits above."""
    max_side: int = 0
    """Longest width or height, in pixels; 0: only `max_pixels` counts."""
    has_guidance: bool = True
    """Whether the model computes guidance; without it `guidance_scale` and `negative_prompt` are refused."""
    has_negative_prompt: bool = True
    """Whether its guidance can steer away from a text of the request's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCard:
    """What one of several processes that compute a model together holds."""

    rank: int
    device: str
    weight_bytes: int
    bytes_read: int = 0
    """Of the checkpoint's files."""
    kv_cache_tokens: int = 0
    """Text: positions whose keys and values its part of the cache has room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a replica tells about its model: shown by `tandem serve`, `/v1/models` and used for validation."""

    name: str
    kind: str
    """"text" or "image"."""
    source: str
    """Folder or hub id as configured."""
    device: str
    dtype: str
    num_parameters: int
    threads: int
    """Compute threads of the replica's process."""
    load_s: float
    """Seconds from process start to ready."""
    aliases: tuple[str, ...] = field(default=())
    created: int = 0
    """Unix seconds."""
    max_model_len: int = 0
    """Text: positions of one sequence, prompt and output together."""
    kv_cache_tokens: int = 0
    """Text."""
    vocab_size: int = 0
    """Text."""
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    """Text: as configured; gateways, which have the chat template, know what auto means."""
    is_reproducible: bool = True
    """Text: whether a seed gives the same tokens again. Not where drafts are rejected by chance (`standard`)."""
    image: ImageLimits | None = None
    """Of an image model."""
    slo_ttft_s: float = 2.0
    slo_tpot_s: float = 0.1
    """Text: what is promised."""
    slo_image_s: float = 60.0
    """Image: the same."""
    ranks: tuple[RankCard, ...] = ()
    """In their order, where several processes compute the model; empty: one does."""
