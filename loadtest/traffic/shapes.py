"""The workloads: endless, seeded sequences of text and image requests, and how they are mixed.

    random             prompts and answers of given lengths, or uniform within a range around them
    prefix_repetition  few long prefixes, each shared by many requests: what a prefix cache is for
    multi_turn         conversations; each turn carries all before it, answers included
    long               mostly short prompts, now and then a very long one: who waits behind it?
    image              pictures of given sizes, steps and guidance

The n-th request of a seed is the same whatever the rate, so runs at several rates ask the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from loadtest.traffic.ask import Ask, ImageAsk, TextAsk
from loadtest.traffic.traces import MOONCAKE_BLOCK_TOKENS, Arrival, ImageArrival, TextArrival
from loadtest.traffic.words import Words

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
FORMS = ("circle", "square", "triangle", "star", "heart", "cross", "diamond")
GROUNDS = ("white", "gray", "black")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """Lengths in tokens, and the fields that only one shape reads."""

    name: str = "random"
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    """Lengths are uniform in [length * (1 - ratio), length * (1 + ratio)]."""
    prefix_len: int = 256
    num_prefixes: int = 4
    num_turns: int = 4
    think_s: float = 0.0
    long_input_len: int = 2048
    long_ratio: float = 0.05
    """Share of requests with a prompt of `long_input_len`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageShape:
    """Each request draws one of the sizes, steps and guidances; empty: the server's own."""

    sizes: tuple[tuple[int, int], ...] = ()
    steps: tuple[int, ...] = ()
    guidances: tuple[float, ...] = ()
    prompt: str = ""
    """Empty: `a red circle on a white background` and its kin."""
    num_images: int = 1
    num_previews: int = 0
    repeat_ratio: float = 0.1
    """Share of requests that repeat an earlier one, seed and all: their pictures must be equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """What is done to a stream of text requests."""

    image_ratio: float = 0.0
    cancel_ratio: float = 0.0
    cancel_after_s: float = 0.0


TEXT_SHAPES = ("random", "prefix_repetition", "multi_turn", "long")


def texts(shape: TextShape, words: Words, seed: int) -> Iterator[TextAsk]:
    source = random.Random(f"texts-{seed}")
    prefixes = [words.prompt(shape.prefix_len, source) for _ in range(shape.num_prefixes)]
    while True:
        if shape.name == "multi_turn":
            yield _conversation(shape, words, source)
            continue
        is_long = shape.name == "long" and source.random() < shape.long_ratio
        num_prompt = shape.long_input_len if is_long else _near(shape.input_len, shape.range_ratio, source)
        prompt = words.prompt(num_prompt, source)
        if shape.name == "prefix_repetition":
            num_prompt += shape.prefix_len
            prompt = f"{source.choice(prefixes)} {prompt}"
        yield _text(prompt, num_prompt, _near(shape.output_len, shape.range_ratio, source), source)


def images(shape: ImageShape, seed: int) -> Iterator[ImageAsk]:
    source = random.Random(f"images-{seed}")
    past: list[ImageAsk] = []
    while True:
        if past and source.random() < shape.repeat_ratio:
            yield source.choice(past)
            continue
        width, height = source.choice(shape.sizes) if shape.sizes else (None, None)
        ask = ImageAsk(
            prompt=shape.prompt or _picture(source),
            width=width,
            height=height,
            num_steps=source.choice(shape.steps) if shape.steps else None,
            guidance=source.choice(shape.guidances) if shape.guidances else None,
            seed=source.getrandbits(31),
            num_images=shape.num_images,
            num_previews=shape.num_previews,
        )
        past = [*past[-15:], ask]  # a repeat comes soon, while the run still lasts
        yield ask


def mixed(text: Iterator[Ask], image: Iterator[ImageAsk], mix: Mix, seed: int) -> Iterator[Ask]:
    """Each request is an image with probability `image_ratio`, and cancelled with `cancel_ratio`."""
    source = random.Random(f"mix-{seed}")
    while True:
        ask: Ask = next(image) if source.random() < mix.image_ratio else next(text)
        is_cancelled = source.random() < mix.cancel_ratio
        yield replace(ask, cancel_after_s=mix.cancel_after_s) if is_cancelled else ask


def probes(seed: int) -> Iterator[TextAsk]:
    """The smallest requests there are: they tell what big ones do to small ones."""
    for number in count():
        yield TextAsk(prompt="Hi", num_prompt=1, num_output=1, seed=seed + number, group="probe")


def replayed(arrivals: Sequence[Arrival], words: Words, seed: int, length_scale: float = 1.0) -> Iterator[Ask]:
    """The requests of a trace, lengths times `length_scale`; over and over where more are wanted."""
    source = random.Random(f"trace-{seed}")
    for arrival in (arrival for _ in count() for arrival in arrivals):
        if isinstance(arrival, ImageArrival):
            yield ImageAsk(
                prompt=_picture(source),
                width=arrival.width,
                height=arrival.height,
                num_steps=arrival.num_steps,
                seed=source.getrandbits(31),
                deadline_s=arrival.deadline_s,
            )
        else:
            yield _recorded(arrival, words, source, length_scale)


def _recorded(arrival: TextArrival, words: Words, source: random.Random, scale: float) -> TextAsk:
    num_prompt, num_output = (max(1, round(length * scale)) for length in (arrival.num_prompt, arrival.num_output))
    if arrival.blocks:
        block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS * scale))
        prompt = words.blocks(arrival.blocks, block_tokens, num_prompt)
    else:
        prompt = words.prompt(num_prompt, source)
    return _text(prompt, num_prompt, num_output, source)


def _conversation(shape: TextShape, words: Words, source: random.Random) -> TextAsk:
    ask: TextAsk | None = None
    for _ in range(shape.num_turns):
        num_prompt, num_output = (_near(n, shape.range_ratio, source) for n in (shape.input_len, shape.output_len))
        turn = _text(words.prompt(num_prompt, source), num_prompt, num_output, source)
        ask = replace(turn, follow_up=ask, think_s=shape.think_s)
    assert ask is not None
    return ask


def _text(prompt: str, num_prompt: int, num_output: int, source: random.Random) -> TextAsk:
    return TextAsk(prompt=prompt, num_prompt=num_prompt, num_output=num_output, seed=source.getrandbits(31))


def _near(length: int, ratio: float, source: random.Random) -> int:
    return max(1, source.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


def _picture(source: random.Random) -> str:
    return f"a {source.choice(COLOURS)} {source.choice(FORMS)} on a {source.choice(GROUNDS)} background"
