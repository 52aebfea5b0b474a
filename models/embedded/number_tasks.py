"""Tasks on numbers: sums, differences, products up to twelve, comparing, counting, and refusing what is too large.

Every task draws an item from the asked side of the split (see split.py). A sum's answer repeats the sum, which brings
all phrasings into one form before the result is due.
"""

import random

from models.embedded.exchange import Exchange, phrase
from models.embedded.split import PRODUCT_PARTS, Split, product_split, split_of, sum_split


def addition(rng: random.Random, split: Split) -> Exchange:
    while True:
        a = operand(rng)
        b = abs((999 if a > 99 else 99) - near(rng, a)) if _is_hard(rng, split) else operand(rng)
        if sum_split(a, b) == split:
            break
    return Exchange("addition", phrase(rng, _SUMS, a=a, b=b), f"{a} + {b} = {a + b}", f"add:{min(a, b)}:{max(a, b)}")


def subtraction(rng: random.Random, split: Split) -> Exchange:
    while True:
        a = operand(rng)
        b = near(rng, a) if _is_hard(rng, split) else operand(rng)
        key = f"sub:{a}:{b}"
        if split_of(key) == split:
            break
    return Exchange("subtraction", phrase(rng, _DIFFERENCES, a=a, b=b), f"{a} - {b} = {a - b}", key)


def product(rng: random.Random, split: Split) -> Exchange:
    """The answer shows its working: a large second factor is split into two, the same two for every first factor. Every
    step has the form of a question of its own, a small product or a sum, and is learnt together with those."""
    while True:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        if product_split(a, b) == split:
            break
    answer = f"{a} * {b} = {a * b}"
    if a > 1 and b in PRODUCT_PARTS:
        left, right = PRODUCT_PARTS[b]
        steps = f"{a} * {left} = {a * left}, {a} * {right} = {a * right}, {a * left} + {a * right} = {a * b}"
        answer = f"{a} * {b}: {steps}"
    return Exchange("product", phrase(rng, _PRODUCTS, a=a, b=b), answer, f"mul:{a}:{b}")


def too_large(rng: random.Random, split: Split) -> Exchange:
    """Sums of numbers above 999 and products of numbers above 12 are refused in words."""
    while True:
        kind = rng.choice(["add", "sub", "mul"])
        if kind == "mul":
            large, other = _above(rng, 13, 4), rng.choice([rng.randint(2, 12), rng.randint(13, 999)])
        else:
            large, other = _above(rng, 1000, 6), rng.choice([operand(rng), rng.randint(1000, 99999)])
        a, b = (large, other) if rng.random() < 0.5 else (other, large)
        key = f"large {kind}:{a}:{b}"
        if split_of(key) == split:
            break
    asks, answer = {
        "add": (_SUMS, "I can only add and subtract numbers up to 999."),
        "sub": (_DIFFERENCES, "I can only add and subtract numbers up to 999."),
        "mul": (_PRODUCTS, "I can only multiply numbers up to 12."),
    }[kind]
    return Exchange("too_large", phrase(rng, asks, a=a, b=b), answer, key)


def comparison(rng: random.Random, split: Split) -> Exchange:
    """Every answer starts with the difference, whatever was asked: one skill, not five, and one that is learnt anyway.
    So a pair is held out only where its difference is."""
    while True:
        a = operand(rng)
        is_close = rng.random() < 0.3
        b = max(0, a + rng.randint(-12, 12)) if is_close else operand(rng)
        if _is_hard(rng, split):
            b = near(rng, a)
        key = f"compare:{min(a, b)}:{max(a, b)}"
        if split_of(key) == split_of(f"sub:{a}:{b}") == split:
            break
    relation = "greater than" if a > b else "less than" if a < b else "equal to"
    kind = rng.choice(["which_larger", "which_smaller", "is_greater", "is_less", "compare"])
    if kind.startswith("which") and a == b:
        kind = "compare"
    asks, conclusion = {
        "which_larger": (_WHICH_LARGER, f"{max(a, b)}"),
        "which_smaller": (_WHICH_SMALLER, f"{min(a, b)}"),
        "is_greater": (_IS_GREATER, "yes" if a > b else "no"),
        "is_less": (_IS_LESS, "yes" if a < b else "no"),
        "compare": (_COMPARE, f"{a} is {relation} {b}"),
    }[kind]
    return Exchange("comparison", phrase(rng, asks, a=a, b=b), f"{a} - {b} = {a - b}, so {conclusion}.", key)


def count_range(rng: random.Random, split: Split) -> Exchange:
    while True:
        shape = rng.choice(["range", "range", "range", "to", "down"])
        length = rng.randint(2, 5 if _is_hard(rng, split) else 15)
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


def near(rng: random.Random, a: int) -> int:
    """A number that is easily confused with `a`: equal, less than a hundred away, with one digit changed, or
    with one digit more or less."""
    kind = rng.random()
    if kind < 0.05:
        return a
    if kind < 0.65:
        return abs(a + rng.choice([-1, 1]) * rng.randint(1, rng.choice([12, 99, 99])))
    digits = list(str(a))
    place = rng.randrange(len(digits))
    if kind < 0.85:
        digits[place] = str(rng.randint(0, 9))
    elif len(digits) == 3 or (len(digits) == 2 and rng.random() < 0.3):
        del digits[place]
    else:
        digits.insert(place + 1, str(rng.randint(0, 9)))
    return int("".join(digits))


def _is_hard(rng: random.Random, split: Split) -> bool:
    """Whether to draw numbers on purpose that are often got wrong: long carries, near or equal numbers, short counts.
    Held-out cases are drawn evenly."""
    return split == "train" and rng.random() < 0.5


def _above(rng: random.Random, least: int, most_digits: int) -> int:
    """A number from `least` up, of every number of digits alike."""
    digits = rng.randint(len(str(least)), most_digits)
    return rng.randint(max(least, 10 ** (digits - 1)), 10**digits - 1)


_SUMS = ["What is {a} + {b}?"] * 4
_SUMS += ["{a}+{b}", "{a} + {b}", "{a}+{b}=", "{a} + {b} =", "{a} + {b} = ?", "{a}+{b}?", "What's {a}+{b}?"]
_SUMS += ["What is {a} plus {b}?", "Add {a} and {b}.", "Calculate {a} + {b}.", "How much is {a} + {b}?"]
_SUMS += ["Compute {a} + {b}.", "What is the sum of {a} and {b}?", "Can you add {a} and {b}?", "{a} plus {b}"]
_SUMS += ["Please add {a} to {b}.", "How much is {a} plus {b}?", "What does {a} + {b} make?", "Solve {a} + {b}."]
_SUMS += ["I have {a} apples and get {b} more. How many apples do I have?", "Hey, what is {a}+{b}?"]

_DIFFERENCES = ["What is {a} - {b}?"] * 4
_DIFFERENCES += ["{a}-{b}", "{a} - {b}", "{a}-{b}=", "{a} - {b} =", "{a} - {b} = ?", "{a}-{b}?", "What's {a}-{b}?"]
_DIFFERENCES += ["What is {a} minus {b}?", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} - {b}?"]
_DIFFERENCES += ["Compute {a} - {b}.", "Take {b} away from {a}.", "Can you subtract {b} from {a}?", "{a} minus {b}"]
_DIFFERENCES += ["How much is {a} minus {b}?", "Solve {a} - {b}.", "Please take {b} from {a}."]

_PRODUCTS = ["What is {a} * {b}?", "What is {a} x {b}?", "What is {a} times {b}?"] * 2
_PRODUCTS += ["{a}*{b}", "{a} * {b}", "{a} x {b}", "{a} × {b}", "{a}*{b}=", "{a} * {b} = ?", "{a} times {b}"]
_PRODUCTS += ["Multiply {a} by {b}.", "Calculate {a} * {b}.", "How much is {a} times {b}?", "Multiply {a} and {b}."]
_PRODUCTS += ["What is the product of {a} and {b}?", "Compute {a} x {b}."]

_WHICH_LARGER = [
    f"{ask}, {{a}} or {{b}}?"
    for ask in ("Which is larger", "Which is greater", "Which is bigger", "Which number is larger", "What is more")
]
_WHICH_SMALLER = [
    f"{ask}, {{a}} or {{b}}?"
    for ask in ("Which is smaller", "Which is less", "Which number is smaller", "What is less")
]
_IS_GREATER = [f"Is {{a}} {greater} {{b}}?" for greater in ("greater than", "larger than", "bigger than", ">")]
_IS_LESS = ["Is {a} less than {b}?", "Is {a} smaller than {b}?", "Is {a} < {b}?"]
_COMPARE = ["Compare {a} and {b}.", "Compare {a} with {b}.", "Compare the numbers {a} and {b}."]
