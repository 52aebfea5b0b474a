"""Tasks on numbers: sums, differences, products up to twelve, comparing, counting.

Every task draws an item from the asked side of the split (see split.py). A sum's answer repeats the sum, which brings
all phrasings into one form before the result is due.
"""

import random

from models.embedded.exchange import Exchange, phrase
from models.embedded.split import Split, product_split, split_of


def addition(rng: random.Random, split: Split) -> Exchange:
    while True:
        a, b = operand(rng), operand(rng)
        key = f"add:{min(a, b)}:{max(a, b)}"
        if split_of(key) == split:
            break
    user = phrase(
        rng,
        ["What is {a} + {b}?"] * 4
        + ["{a}+{b}", "{a} + {b}", "{a}+{b}=", "{a} + {b} =", "{a} + {b} = ?", "{a}+{b}?", "What's {a}+{b}?"]
        + ["What is {a} plus {b}?", "Add {a} and {b}.", "Calculate {a} + {b}.", "How much is {a} + {b}?"]
        + ["Compute {a} + {b}.", "What is the sum of {a} and {b}?", "Can you add {a} and {b}?", "{a} plus {b}"]
        + ["Please add {a} to {b}.", "How much is {a} plus {b}?", "What does {a} + {b} make?", "Solve {a} + {b}."]
        + ["I have {a} apples and get {b} more. How many apples do I have?", "Hey, what is {a}+{b}?"],
        a=a,
        b=b,
    )
    return Exchange("addition", user, f"{a} + {b} = {a + b}", key)


def subtraction(rng: random.Random, split: Split) -> Exchange:
    while True:
        a, b = operand(rng), operand(rng)
        key = f"sub:{a}:{b}"
        if split_of(key) == split:
            break
    user = phrase(
        rng,
        ["What is {a} - {b}?"] * 4
        + ["{a}-{b}", "{a} - {b}", "{a}-{b}=", "{a} - {b} =", "{a} - {b} = ?", "{a}-{b}?", "What's {a}-{b}?"]
        + ["What is {a} minus {b}?", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} - {b}?"]
        + ["Compute {a} - {b}.", "Take {b} away from {a}.", "Can you subtract {b} from {a}?", "{a} minus {b}"]
        + ["How much is {a} minus {b}?", "Solve {a} - {b}.", "Please take {b} from {a}."],
        a=a,
        b=b,
    )
    return Exchange("subtraction", user, f"{a} - {b} = {a - b}", key)


def product(rng: random.Random, split: Split) -> Exchange:
    while True:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        if product_split(a, b) == split:
            break
    user = phrase(
        rng,
        ["What is {a} * {b}?", "What is {a} x {b}?", "What is {a} times {b}?"] * 2
        + ["{a}*{b}", "{a} * {b}", "{a} x {b}", "{a} × {b}", "{a}*{b}=", "{a} * {b} = ?", "{a} times {b}"]
        + ["Multiply {a} by {b}.", "Calculate {a} * {b}.", "How much is {a} times {b}?", "Multiply {a} and {b}."]
        + ["What is the product of {a} and {b}?", "Compute {a} x {b}."],
        a=a,
        b=b,
    )
    swapped = f"{b} * {a} = " if a < b else ""
    return Exchange("product", user, f"{a} * {b} = {swapped}{a * b}", f"mul:{a}:{b}")


def comparison(rng: random.Random, split: Split) -> Exchange:
    while True:
        a = operand(rng)
        near = rng.random() < 0.3
        b = max(0, a + rng.randint(-12, 12)) if near else operand(rng)
        key = f"compare:{min(a, b)}:{max(a, b)}"
        if split_of(key) == split:
            break
    relation = "greater than" if a > b else "less than" if a < b else "equal to"
    kind = rng.choice(["which_larger", "which_smaller", "is_greater", "is_less", "compare"])
    if kind.startswith("which") and a == b:
        kind = "compare"
    if kind == "which_larger":
        user = phrase(rng, [f"{ask}, {{a}} or {{b}}?" for ask in _WHICH_LARGER], a=a, b=b)
        answer = f"{max(a, b)} is greater than {min(a, b)}."
    elif kind == "which_smaller":
        user = phrase(rng, [f"{ask}, {{a}} or {{b}}?" for ask in _WHICH_SMALLER], a=a, b=b)
        answer = f"{min(a, b)} is less than {max(a, b)}."
    elif kind == "is_greater":
        asks = ["Is {a} greater than {b}?", "Is {a} larger than {b}?", "Is {a} bigger than {b}?", "Is {a} > {b}?"]
        user = phrase(rng, asks, a=a, b=b)
        answer = f"{'Yes' if a > b else 'No'}, {a} is {relation} {b}."
    elif kind == "is_less":
        user = phrase(rng, ["Is {a} less than {b}?", "Is {a} smaller than {b}?", "Is {a} < {b}?"], a=a, b=b)
        answer = f"{'Yes' if a < b else 'No'}, {a} is {relation} {b}."
    else:
        user = phrase(
            rng, ["Compare {a} and {b}.", "Compare {a} with {b}.", "Compare the numbers {a} and {b}."], a=a, b=b
        )
        answer = f"{a} is {relation} {b}."
    return Exchange("comparison", user, answer, key)


def count_range(rng: random.Random, split: Split) -> Exchange:
    while True:
        shape = rng.choice(["range", "range", "range", "to", "down"])
        length = rng.randint(2, 15)
        start = 1 if shape == "to" else rng.choice([rng.randint(0, 20), rng.randint(0, 100), rng.randint(0, 100)])
        end = start + length - 1
        if shape == "down":
            start, end = end, start
        key = f"count:{start}:{end}"
        if split_of(key) == split:
            break
    if shape == "to":
        asks = [
            "Count to {b}.",
            "Count up to {b}.",
            "Please count to {b}.",
            "Can you count to {b}?",
            "Count from 1 to {b}.",
        ]
    elif shape == "down":
        asks = ["Count from {a} to {b}.", "Count down from {a} to {b}.", "Count backwards from {a} to {b}."]
    else:
        asks = ["Count from {a} to {b}.", "Count from {a} to {b}.", "Count {a} to {b}.", "Count up from {a} to {b}."]
        asks += ["Please count from {a} to {b}.", "Can you count from {a} to {b}?", "List the numbers from {a} to {b}."]
    step = 1 if end >= start else -1
    answer = ", ".join(str(i) for i in range(start, end + step, step))
    return Exchange("counting", phrase(rng, asks, a=start, b=end), answer, key)


def operand(rng: random.Random) -> int:
    """Half of the numbers have up to two digits, half up to three."""
    return rng.randint(0, 99) if rng.random() < 0.5 else rng.randint(0, 999)


_WHICH_LARGER = ["Which is larger", "Which is greater", "Which is bigger", "Which number is larger", "What is more"]
_WHICH_SMALLER = ["Which is smaller", "Which is less", "Which number is smaller", "What is less"]
