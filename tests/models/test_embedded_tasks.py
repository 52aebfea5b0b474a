"""The generated conversations: nothing held out is ever trained on, and every answer is right."""

import random
import re

import pytest

from models.embedded.cases import ARITHMETIC, CASE_TASKS, held_out_cases, is_correct
from models.embedded.chats import long_chat, recall_chat, training_chat
from models.embedded.split import PRODUCT_PARTS, product_split, split_of, sum_split
from models.embedded.stories import is_story
from models.embedded.tasks import TASKS
from models.embedded.vocabulary import name_key

KEYED = [task for task in TASKS if task not in ("greeting", "unknown")]


def side(key: str) -> str:
    kind, _, rest = key.partition(":")
    rule = {"mul": product_split, "add": sum_split}.get(kind)
    return rule(*map(int, rest.split(":"))) if rule else split_of(key)


def test_no_training_chat_contains_a_held_out_item():
    rng = random.Random(1)
    keys = [key for _ in range(20_000) for key in training_chat(rng).keys]
    keys += [key for _ in range(200) for key in long_chat(rng, num_turns=40).keys]
    assert len(keys) > 30_000
    assert {side(key) for key in keys} == {"train"}


@pytest.mark.parametrize("task", KEYED)
def test_training_and_held_out_items_are_disjoint(task):
    rng = random.Random(2)
    trained = {TASKS[task](rng, "train").key for _ in range(4000)} - {""}
    held_out = {TASKS[task](rng, "held_out").key for _ in range(1000)}
    assert trained and held_out and "" not in held_out
    assert not trained & held_out
    assert {side(key) for key in held_out} == {"held_out"}


def test_recalled_names_were_never_trained_on_in_any_task():
    rng = random.Random(3)
    seen: set[str] = set()
    for _ in range(20_000):
        for message in training_chat(rng).messages:
            seen.update(re.findall(r"\w+", message["content"].lower()))
    recalled = {recall_chat(rng, "held_out")[1] for _ in range(1000)}
    assert len(recalled) > 300
    assert {split_of(name_key(value)) for value in recalled} == {"held_out"}
    # A name may still be an everyday word ("Star"): everyday words are trained on as words, never as names.
    assert len([value for value in recalled if value.lower() in seen]) < 0.02 * len(recalled)


def test_every_held_out_product_has_its_mirror_image_in_training():
    held_out = [(a, b) for a in range(13) for b in range(13) if product_split(a, b) == "held_out"]
    assert len(held_out) >= 5
    assert all(product_split(b, a) == "train" for a, b in held_out)


def test_no_held_out_sum_is_a_step_of_a_product():
    steps = [(a * left, a * right) for a in range(13) for left, right in PRODUCT_PARTS.values()]
    assert {sum_split(*step) for step in steps} | {sum_split(*reversed(step)) for step in steps} == {"train"}
    shown = [re.search(r"(\d+) \+ (\d+) = \d+$", case.expected) for case in held_out_cases("product", 300)]
    assert any(shown)
    assert {(int(step[1]), int(step[2])) for step in shown if step} <= set(steps)


def test_no_held_out_difference_is_shown_by_a_comparison():
    rng = random.Random(5)
    shown = [TASKS["comparison"](rng, "train").answer.split(" = ")[0].split(" - ") for _ in range(4000)]
    assert {split_of(f"sub:{a}:{b}") for a, b in shown} == {"train"}


def test_about_a_tenth_of_all_keys_is_held_out():
    share = sum(split_of(f"sub:{a}:{b}") == "held_out" for a in range(200) for b in range(200)) / 40_000
    assert 0.09 < share < 0.11  # standard deviation 0.0015


@pytest.mark.parametrize("task", ARITHMETIC)
def test_arithmetic_answers_are_what_python_computes(task):
    for case in held_out_cases(task, 300):
        question, _, steps = case.expected.rpartition(": ")
        for step in steps.split(", "):
            left, result = step.split(" = ")
            assert eval(left) == int(result)
        question = question or left
        assert eval(question) == int(result)
        asked = re.findall(r"\d+", case.messages[-1]["content"])
        assert sorted(re.findall(r"\d+", question)) == sorted(asked)


def test_copies_and_reversals_hold_the_words_of_the_prompt():
    for case in held_out_cases("copying", 300):
        assert case.messages[-1]["content"].rstrip().endswith(case.expected)
    for case in held_out_cases("reversing", 300):
        words = re.findall(r"[^\s,]+", case.expected)
        assert re.findall(r"[^\s,]+", case.messages[-1]["content"])[-len(words) :] == words[::-1]


def test_recall_asks_for_something_told_turns_earlier():
    for case in held_out_cases("recall", 200):
        value = case.expected.rstrip(".").split()[-1]
        assert split_of(name_key(value)) == "held_out"
        said = [message["content"] if message["role"] == "user" else "" for message in case.messages]
        told = max(turn for turn, content in enumerate(said) if value in content)
        assert len(said) - 1 - told >= 4


def test_the_expected_answer_is_correct_and_another_is_not():
    for task in CASE_TASKS:
        for case in held_out_cases(task, 50):
            assert is_correct(case.expected, case)
            assert not is_correct(case.expected + " 7", case)
            assert not is_correct("", case)


def test_cases_repeat_for_a_seed_and_differ_between_seeds():
    assert held_out_cases("addition", 20, seed=5) == held_out_cases("addition", 20, seed=5)
    assert held_out_cases("addition", 20, seed=5) != held_out_cases("addition", 20, seed=6)


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'division'.*addition"):
        held_out_cases("division", 1)


def test_a_story_with_two_names_is_none():
    good = held_out_cases("story", 1)[0]
    hero = re.search(r"named (\w+)", good.expected)[1]
    assert is_story(good.expected, good.subject)
    first, rest = good.expected.split(". ", 1)
    assert not is_story(f"{first}. {rest.replace(hero, 'Nobody')}", good.subject)
    assert not is_story(good.expected, "submarine")
