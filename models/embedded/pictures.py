"""The pictures `tandem-image` learns: one flat shape on a plain background, drawn from distances.

A combination is a shape, a colour and a background. One tenth of them, by hash, is never trained on (`split.py`), so
that a right picture of a held-out one was put together, not remembered. Size and place vary freely on both sides.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.embedded.split import Split, split_of

# Legend: B pictures, H rows, W columns

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "cyan": (60, 200, 220),
    "blue": (40, 80, 220),
    "purple": (140, 60, 180),
    "pink": (250, 150, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
"""RGB, 0 to 255. The closest two (orange and yellow) are 83 apart."""

BACKGROUNDS = ("white", "black", "gray")
SIZES = ("small", "large")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
PLACES = ("center", *ROWS, *COLUMNS, *(f"{row} {column}" for row in ROWS for column in COLUMNS))
MARGIN = 0.05
"""Least distance of a shape from the border, as a share of the shorter side."""


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.86


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 1) / math.sqrt(2)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = (1.75 * x.abs() - 0.95 * (y + 1)) / math.hypot(1.75, 0.95)
    return torch.maximum(side, y - 0.75)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points; each tenth is the half plane through a tip and the notch beside it, at 0.42 of the radius."""
    fifth = 2 * math.pi / 5
    radius, angle = torch.hypot(x, y), torch.atan2(x, -y)
    angle = torch.remainder(angle + fifth / 2, fifth) - fifth / 2
    along, across = radius * torch.cos(angle), radius * torch.sin(angle).abs()
    notch_along, notch_across = 0.42 * math.cos(fifth / 2), 0.42 * math.sin(fifth / 2)
    length = math.hypot(1 - notch_along, notch_across)
    return ((along - 1) * notch_across + across * (1 - notch_along)) / length


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.3, y - 0.95), torch.maximum(y - 0.3, x - 0.95))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76).abs() - 0.24


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
"""Signed distance from the edge, negative inside, for a shape of radius 1 around the origin, y downwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """What is held out or trained on."""

    shape: str
    colour: str
    background: str

    @property
    def split(self) -> Split:
        return split_of(f"{self.colour} {self.shape} on {self.background}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One drawing. Centre and radius are in pixels, colours in 0..1."""

    shape: str
    ink: tuple[float, float, float]
    paper: tuple[float, float, float]
    x: float
    y: float
    radius: float


COMBINATIONS = tuple(
    Combination(shape=shape, colour=colour, background=background)
    for shape in SHAPES
    for colour in COLOURS
    for background in BACKGROUNDS
    if colour != background
)


def combinations(split: Split) -> list[Combination]:
    """All combinations of one side, in a fixed order."""
    return [combination for combination in COMBINATIONS if combination.split == split]


def rgb(name: str) -> tuple[float, float, float]:
    """A colour's red, green and blue, 0 to 1."""
    red, green, blue = COLOURS[name]
    return red / 255, green / 255, blue / 255


def random_picture(
    combination: Combination, height: int, width: int, rng: random.Random, *, size: str | None, place: str | None
) -> Picture:
    """A picture with that size and place; without a size it is middling, without a place near the centre."""
    away = place not in (None, "center")
    smallest, largest = {
        "small": (0.16, 0.19),
        None: (0.21, 0.24) if away else (0.23, 0.32),
        "large": (0.28, 0.31) if away else (0.37, 0.42),
    }[size]
    radius = rng.uniform(smallest, largest)
    jitter = 0.02 if place else 0.05
    words = (place or "").split()
    x = 0.5 + rng.uniform(-jitter, jitter) + 0.22 * (("right" in words) - ("left" in words))
    y = 0.5 + rng.uniform(-jitter, jitter) + 0.22 * (("bottom" in words) - ("top" in words))
    side = min(height, width)
    least = (radius + MARGIN) * side
    return Picture(
        shape=combination.shape,
        ink=rgb(combination.colour),
        paper=rgb(combination.background),
        x=min(max(x * width, least), width - least),
        y=min(max(y * height, least), height - least),
        radius=radius * side,
    )


def with_random_colours(picture: Picture, rng: random.Random) -> Picture:
    """The same drawing in any two colours, which an autoencoder should carry as well."""
    ink, paper = ((rng.random(), rng.random(), rng.random()) for _ in range(2))
    return replace(picture, ink=ink, paper=paper)


def draw(pictures: Sequence[Picture], height: int, width: int) -> Tensor:
    """Float images [B, 3, H, W] in 0..1, edges smoothed over one pixel."""
    x_B11, y_B11, radius_B11 = (
        torch.tensor(values).view(-1, 1, 1)
        for values in (
            [picture.x for picture in pictures],
            [picture.y for picture in pictures],
            [picture.radius for picture in pictures],
        )
    )
    x_BHW = (torch.arange(width) + 0.5 - x_B11) / radius_B11
    y_BHW = (torch.arange(height).view(-1, 1) + 0.5 - y_B11) / radius_B11
    cover_BHW = torch.empty(len(pictures), height, width)
    for shape in sorted({picture.shape for picture in pictures}):
        rows = [row for row, picture in enumerate(pictures) if picture.shape == shape]
        x, y = torch.broadcast_tensors(x_BHW[rows], y_BHW[rows])
        cover_BHW[rows] = (0.5 - SHAPES[shape](x, y) * radius_B11[rows]).clamp(0, 1)
    ink_B3, paper_B3 = (
        torch.tensor(values)[:, :, None, None]
        for values in ([picture.ink for picture in pictures], [picture.paper for picture in pictures])
    )
    return torch.lerp(paper_B3, ink_B3, cover_BHW[:, None])
