"""The words the generated conversations are made of: lists, and invented words for what must work with any word.

Copying and recall must not depend on known words, so about half of the words and names are invented from syllables.
"""

import random

from models.embedded.split import Split, split_of


def _words(text: str, separator: str = " ") -> list[str]:
    """The entries of a wrapped text."""
    return " ".join(text.split()).split(separator)


WORDS = _words(
    """
    red green blue yellow black white orange purple pink brown gold silver apple pear plum grape lemon peach melon
    cherry banana berry bread butter cheese milk water honey salt sugar rice soup cake egg fish meat table chair
    lamp door window wall floor roof house garden tree leaf root flower grass river lake sea hill stone sand cloud
    rain snow wind storm sun moon star sky fire smoke ice winter spring summer autumn morning evening night day week
    month year hour minute clock book page letter word pen paper desk school teacher pupil lesson song drum piano
    guitar dance game ball toy kite boat ship train car bus bike road bridge town city village market shop money
    coin ring gift box bag cup plate spoon fork knife pot oven bed pillow blanket shirt coat hat shoe sock glove
    scarf button needle thread hand foot head eye ear nose mouth arm leg heart bone cat dog horse cow sheep goat pig
    hen duck goose mouse rabbit fox wolf bear lion tiger owl eagle crow frog snake bee ant fly spider whale shark
    one two three four five six seven eight nine ten north south east west left right up down big small old new long
    short fast slow hot cold good bad happy sad run walk jump sing read write play
    """
)

COLOURS = _words(
    """
    red green blue yellow black white orange purple pink brown gold silver grey turquoise violet crimson
    """
)

NAMES = _words(
    """
    Ada Alan Alice Amir Amy Ana Andrea Anna Anton Arthur Ben Bella Bob Boris Carl Carla Carlos Carmen Chen Chloe
    Clara Claire Daniel David Dana Diego Dora Ed Edith Elena Eli Ella Elsa Emil Emily Emma Eric Erik Eva Fatima
    Felix Finn Fiona Frank Frida Gabriel George Grace Greta Hana Hannah Harry Hassan Helen Henry Hugo Ian Ida Ines
    Ingrid Iris Isaac Ivan Jack Jacob James Jan Jane Jean Jim Joan Joe Johan John Jonas Jose Joy Julia June Kai
    Karen Karl Kate Ken Kim Kofi Lara Laura Lea Lee Lena Leo Lia Liam Lily Lina Linda Lisa Louis Lucas Lucy Luis
    Luna Maja Mara Marco Maria Marie Mark Martha Martin Mary Mateo Max Maya Mei Mia Mila Milan Miriam Mohammed Nadia
    Nils Nina Noah Nora Olga Oliver Olivia Omar Oscar Otto Paul Paula Pedro Peter Petra Philip Priya Rachel Rafael
    Ravi Rita Robert Robin Rosa Ruth Sam Samir Sara Sarah Simon Sofia Sonja Stefan Sven Tara Theo Thomas Tim Tina
    Tom Tomas Uma Vera Victor Viktor Vincent Wei Will Yara Yuki Yusuf Zara Zoe
    """
)

CITIES = _words(
    """
    Paris London Berlin Rome Madrid Vienna Prague Oslo Bern Lisbon Dublin Athens Warsaw Helsinki Stockholm Cairo
    Lagos Nairobi Tokyo Kyoto Delhi Mumbai Beijing Seoul Sydney Toronto Boston Chicago Denver Seattle Austin Lima
    Quito Bogota Havana Zurich Geneva Munich Hamburg Cologne Lyon Milan Naples Porto Krakow Riga Tallinn Vilnius
    Sofia Accra Dakar Tunis
    """
)

ANIMALS = _words(
    """
    cat dog fox bear mouse rabbit horse bird frog owl lion duck hen wolf goat sheep fish turtle dragon hedgehog
    squirrel pig cow elephant monkey penguin tiger snail bee whale
    """
)
PEOPLE = _words(
    """
    boy girl farmer king queen baker sailor teacher wizard knight painter robot princess fisherman giant
    """
)

COUNTRIES = _words(
    """
    France Germany Italy Spain Japan China India Brazil Canada Kenya Egypt Norway Peru Poland
    """
)

TOPICS = _words(
    """
    quantum physics, football, politics, music, history, python, the weather, the stock market, cooking, love,
    machine learning, the universe, computers, climate change, war, philosophy, space travel, chess, medicine,
    economics, the news, art, dinosaurs
    """,
    ", ",
)
"""Subjects of questions the models do not answer."""

_ONSETS = _words(
    """
    b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl pr sh sk st th tr
    """
)
_VOWELS = _words(
    """
    a e i o u a e i o ai ea ee ia io oo ou
    """
)
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "t", "k", "nd", "rt", "x", "ng", "ck"]


def invented_word(rng: random.Random) -> str:
    """A word of one to three syllables that need not exist."""
    syllables = rng.choices((1, 2, 3), (10, 10, 1))[0]
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def name(rng: random.Random, split: Split, invented: float = 0.5) -> str:
    """A name on the given side of the split, invented with the given probability."""
    return _proper(rng, NAMES, split, invented)


def city(rng: random.Random, split: Split) -> str:
    """A place on the given side of the split. Held-out ones are invented, since questions outside the tasks may be
    about any real one."""
    return _proper(rng, CITIES, split, invented=0.5 if split == "train" else 1.0)


def word(rng: random.Random, invented: float = 0.35) -> str:
    """A word for lists. Invented ones are never held-out names, or copying would show what recall holds out."""
    while True:
        candidate = invented_word(rng) if rng.random() < invented else rng.choice(WORDS)
        if split_of(name_key(candidate)) == "train":
            return candidate


def name_key(candidate: str) -> str:
    """The key that decides on which side a name, or a place, is."""
    return f"name:{candidate}"


def _proper(rng: random.Random, known: list[str], split: Split, invented: float) -> str:
    while True:
        candidate = invented_word(rng).capitalize() if rng.random() < invented else rng.choice(known)
        if split == "held_out" and candidate in CITIES:
            continue
        if len(candidate) >= 2 and split_of(name_key(candidate)) == split:
            return candidate
