"""What is asked: lengths, shared parts, mixes, and that a seed fixes them."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from itertools import islice

import pytest

from loadtest.traffic.ask import ImageAsk, TextAsk
from loadtest.traffic.shapes import ImageShape, Mix, TextShape, images, mixed, probes, replayed, texts
from loadtest.traffic.traces import ImageArrival, TextArrival
from loadtest.traffic.words import Words

WORDS = Words.uncounted()


def some(shape: TextShape, number: int = 200, seed: int = 0) -> list[TextAsk]:
    return list(islice(texts(shape, WORDS, seed), number))


def test_prompts_have_the_asked_number_of_tokens_by_who_counts():
    async def count(text: str) -> int:  # every word of more than four letters is two tokens
        return sum(1 + (len(word) > 4) for word in text.split())

    async def scenario() -> None:
        words = await Words.measured(count)
        for number in (1, 2, 17, 300):
            assert number <= await count(words.prompt(number, random.Random(number))) <= number + 1

    asyncio.run(scenario())


def test_fixed_lengths_are_fixed_and_random_ones_stay_within_their_range():
    assert {(ask.num_prompt, ask.num_output) for ask in some(TextShape(input_len=40, output_len=9))} == {(40, 9)}
    asks = some(TextShape(input_len=100, output_len=50, range_ratio=0.2))
    assert {min(ask.num_prompt for ask in asks), max(ask.num_prompt for ask in asks)} == {80, 120}
    assert all(40 <= ask.num_output <= 60 and len(ask.prompt.split()) == ask.num_prompt for ask in asks)


def test_prefixes_are_shared_and_what_follows_is_not():
    asks = some(TextShape(name="prefix_repetition", prefix_len=30, num_prefixes=3, input_len=10))
    assert len({" ".join(ask.prompt.split()[:30]) for ask in asks}) == 3
    assert len({ask.prompt for ask in asks}) == len(asks)
    assert {ask.num_prompt for ask in asks} == {40}


def test_a_conversation_is_as_many_asks_behind_each_other():
    [ask] = some(TextShape(name="multi_turn", num_turns=4, think_s=0.5), 1)
    turns = [ask]
    while (follow_up := turns[-1].follow_up) is not None:
        turns.append(follow_up)
    assert len(turns) == 4 and len({turn.prompt for turn in turns}) == 4
    assert all(turn.think_s == 0.5 for turn in turns)


def test_long_prompts_come_in_their_share():
    """Of 2000 draws of one fixed seed."""
    asks = some(TextShape(name="long", long_input_len=500, long_ratio=0.1, input_len=8), 2000)
    assert sum(ask.num_prompt == 500 for ask in asks) / 2000 == pytest.approx(0.1, abs=0.02)


def test_a_seed_fixes_the_requests():
    assert some(TextShape(range_ratio=0.5), seed=4) == some(TextShape(range_ratio=0.5), seed=4)
    assert some(TextShape(), seed=4) != some(TextShape(), seed=5)


def test_images_draw_from_what_is_given_and_some_are_asked_for_again():
    shape = ImageShape(sizes=((64, 64), (96, 64)), steps=(4, 8), guidances=(1.0,), repeat_ratio=0.3)
    asks = list(islice(images(shape, 0), 400))
    assert {(ask.width, ask.height) for ask in asks} == {(64, 64), (96, 64)} and {ask.num_steps for ask in asks} == {
        4,
        8,
    }
    assert (len(asks) - len(set(asks))) / len(asks) == pytest.approx(0.3, abs=0.06)


def test_a_mix_has_its_shares_of_images_and_of_cancelled_requests():
    mix = Mix(image_ratio=0.25, cancel_ratio=0.1, cancel_after_s=0.2)
    asks = list(islice(mixed(texts(TextShape(), WORDS, 0), images(ImageShape(), 0), mix, 0), 2000))
    assert sum(isinstance(ask, ImageAsk) for ask in asks) / 2000 == pytest.approx(0.25, abs=0.03)
    assert sum(ask.cancel_after_s == 0.2 for ask in asks) / 2000 == pytest.approx(0.1, abs=0.02)


def test_probes_are_one_token_in_a_group_of_their_own():
    ask = next(probes(0))
    assert (ask.group, ask.num_output) == ("probe", 1)


def test_a_replayed_trace_shares_what_its_block_ids_share_and_scales_its_lengths():
    recorded = TextArrival(at_s=0.0, num_prompt=1200, num_output=100, blocks=(7, 8, 9))
    other = replace(recorded, blocks=(7, 8, 10))
    first, second, again = islice(replayed([recorded, other], WORDS, 0, length_scale=0.1), 3)
    assert isinstance(first, TextAsk) and isinstance(second, TextAsk)
    assert (first.num_prompt, first.num_output) == (120, 10) and len(first.prompt.split()) == 120
    assert first.prompt.split()[:102] == second.prompt.split()[:102]
    assert first.prompt.split()[102:] != second.prompt.split()[102:]
    assert isinstance(again, TextAsk) and again.prompt == first.prompt


def test_a_replayed_image_keeps_its_size_and_deadline():
    [ask] = islice(replayed([ImageArrival(at_s=0, width=8, height=16, num_steps=3, deadline_s=1.5)], WORDS, 0), 1)
    assert isinstance(ask, ImageAsk)
    assert (ask.width, ask.height, ask.num_steps, ask.deadline_s) == (8, 16, 3, 1.5)
