"""Tells shape, colour and background of a picture from its pixels, by rules and without a network.

The judge of `tandem-image`: in tests, in the evaluation and now and then while it trains. It is right on every clean
drawing, and answers None for what it does not recognise rather than the nearest name.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from models.embedded.pictures import BACKGROUNDS, COLOURS, PLACES, SHAPES, Combination, rgb

# Legend: H rows, W columns

FARTHEST_COLOUR = 0.2
"""A colour farther than this from every name (RGB, each 0..1) has none; the two closest names are 0.33 apart."""
LEAST_OVERLAP = 0.7
"""Least intersection over union with the best shape, at its place and size."""

FAINT = 0.15
"""Pixels with less of the colour than this count as background."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was recognised. Place is one of the nine named ones; `radius` is a share of the shorter side."""

    shape: str | None
    colour: str | None
    background: str | None
    overlap: float = 0.0
    radius: float = 0.0
    place: str = "center"

    def shows(self, combination: Combination) -> bool:
        seen = (self.shape, self.colour, self.background)
        return seen == (combination.shape, combination.colour, combination.background)


def read_picture(image_3HW: Tensor) -> Reading:
    """Read an image with values in 0..1."""
    _, height, width = image_3HW.shape
    border = torch.cat(
        [image_3HW[:, 0], image_3HW[:, -1], image_3HW[:, :, 0], image_3HW[:, :, -1]],
        dim=1,
    )
    paper_3 = border.median(1).values
    background = _name(paper_3, BACKGROUNDS)
    distance_HW = (image_3HW - paper_3[:, None, None]).norm(dim=0)
    if distance_HW.max() < FARTHEST_COLOUR:
        return Reading(None, None, background)
    # Pixels on the edge are mixtures; those far from the background by almost as much as any are pure.
    pure_HW = distance_HW > 0.8 * distance_HW.flatten().quantile(0.995)
    ink_3 = image_3HW[:, pure_HW].median(1).values
    step_3 = ink_3 - paper_3
    cover_HW = ((image_3HW - paper_3[:, None, None]) * step_3[:, None, None]).sum(0) / step_3.square().sum()
    cover_HW = torch.where(cover_HW < FAINT, 0, cover_HW.clamp(max=1))
    inside = cover_HW > 0.5
    if not inside.any():
        return Reading(None, None, background)
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    top, bottom = float(rows[0]), float(rows[-1] + 1)
    left, right = float(columns[0]), float(columns[-1] + 1)
    overlaps = {shape: _overlap(shape, cover_HW) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return Reading(
        shape if overlaps[shape] >= LEAST_OVERLAP else None,
        _name(ink_3, COLOURS),
        background,
        overlaps[shape],
        (right - left + bottom - top) / 4 / min(height, width),
        _place((left + right) / 2 / width, (top + bottom) / 2 / height),
    )


def _name(colour_3: Tensor, names: "tuple[str, ...] | dict[str, tuple[int, int, int]]") -> str | None:
    distances = {name: float((colour_3 - torch.tensor(rgb(name))).norm()) for name in names}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= FARTHEST_COLOUR else None


def _overlap(shape: str, cover_HW: Tensor) -> float:
    """Intersection over union with the shape of the same area around the same centre of mass."""
    height, width = cover_HW.shape
    area, shape_x, shape_y = _moments(shape)
    columns_W, rows_H1 = torch.arange(width) + 0.5, torch.arange(height).view(-1, 1) + 0.5
    total = cover_HW.sum()
    scale = (total / area).sqrt()
    x = (columns_W - (cover_HW * columns_W).sum() / total) / scale + shape_x
    y = (rows_H1 - (cover_HW * rows_H1).sum() / total) / scale + shape_y
    x, y = torch.broadcast_tensors(x, y)
    expected_HW = (0.5 - SHAPES[shape](x, y) * scale).clamp(0, 1)
    return float(torch.minimum(expected_HW, cover_HW).sum() / torch.maximum(expected_HW, cover_HW).sum())


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass of a shape of radius 1."""
    line = torch.linspace(-1.1, 1.1, 441)
    x, y = torch.broadcast_tensors(line, line.view(-1, 1))
    inside = SHAPES[shape](x, y) <= 0
    return float(inside.sum()) * (2.2 / 440) ** 2, float(x[inside].mean()), float(y[inside].mean())


def _place(x: float, y: float) -> str:
    """The named place nearest to a centre, whose coordinates are shares of width and height."""
    column = "left" if x < 0.41 else "right" if x > 0.59 else ""
    row = "top" if y < 0.41 else "bottom" if y > 0.59 else ""
    place = f"{row} {column}".strip() or "center"
    assert place in PLACES
    return place
