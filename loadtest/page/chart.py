"""Charts as inline SVG: scales with round ticks, lines, areas, bars and marks. Colours are classes of `style.css`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 40
LOG_FROM = 30.0
"""A positive range that spans more than this factor is drawn in logarithms."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One series. `colour` is the number of a colour, or `bad`."""

    name: str
    points: Sequence[Point]
    colour: int | str = 0
    is_dashed: bool = False
    has_dots: bool = False
    is_filled: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Heights at equal distances."""

    name: str
    points: Sequence[Point]
    width: float
    colour: int | str = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A line across at a value, with a word."""

    value: float
    text: str
    is_found: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line] = ()
    bars: Sequence[Bars] = ()
    x_marks: Sequence[Mark] = ()
    y_marks: Sequence[Mark] = ()
    x_is_log: bool = False
    y_is_log: bool | None = None
    """None: where the values ask for it."""
    y_top: float | None = None
    is_wide: bool = False
    height: int = HEIGHT
    note: str = ""

    def svg(self) -> str:
        """The figure: title, keys and drawing."""
        width = 2 * WIDTH + 40 if self.is_wide else WIDTH
        x, y = self._scales(width)
        body = [
            *self._axes(x, y, width),
            *(_drawn_bars(bars, x, y) for bars in self.bars),
            *(_drawn_line(line, x, y) for line in self.lines),
            *self._drawn_marks(x, y, width),
        ]
        drawn: list[Line | Bars] = [*self.lines, *self.bars]
        keys = "".join(_key(one) for one in drawn if one.name)
        note = f"<span>{escape(self.note)}</span>" if self.note else ""
        wide = ' class="wide"' if self.is_wide else ""
        label = escape(f"{self.title}: {self.y_label} over {self.x_label}")
        return (
            f"<figure{wide}><h3>{escape(self.title)}</h3><figcaption>{keys}{note}</figcaption>"
            f'<svg viewBox="0 0 {width} {self.height}" role="img" aria-label="{label}">{"".join(body)}</svg></figure>'
        )

    def _scales(self, width: int) -> tuple[Scale, Scale]:
        drawn: list[Line | Bars] = [*self.lines, *self.bars]
        xs = [point[0] for one in drawn for point in one.points] + [mark.value for mark in self.x_marks]
        ys = [point[1] for one in drawn for point in one.points]
        top = max(ys, default=1.0)
        ys += [mark.value for mark in self.y_marks if mark.value <= 4 * top]
        is_log = _wants_log(ys) if self.y_is_log is None else self.y_is_log
        x = Scale.over(xs, LEFT, width - RIGHT, is_log=self.x_is_log, has_zero=False)
        y = Scale.over(ys, self.height - BOTTOM, TOP, is_log=is_log, has_zero=not is_log, top=self.y_top)
        return x, y

    def _axes(self, x: Scale, y: Scale, width: int) -> list[str]:
        base = self.height - BOTTOM
        drawn = []
        for value in y.ticks:
            at = y(value)
            drawn.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            drawn.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{told(value)}</text>')
        for value in x.ticks:
            drawn.append(f'<text x="{x(value):.1f}" y="{base + 18}" text-anchor="middle">{told(value)}</text>')
        drawn.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>')
        place = f'x="{(LEFT + width - RIGHT) / 2}" y="{self.height - 4}" text-anchor="middle"'
        drawn.append(f'<text class="label" {place}>{escape(self.x_label)}</text>')
        centre = (TOP + base) / 2
        place = f'x="12" y="{centre}" text-anchor="middle" transform="rotate(-90 12 {centre})"'
        drawn.append(f'<text class="label" {place}>{escape(self.y_label)}</text>')
        return drawn

    def _drawn_marks(self, x: Scale, y: Scale, width: int) -> list[str]:
        drawn = []
        for mark in self.x_marks:
            at, kind = x(mark.value), "found" if mark.is_found else "rule"
            drawn.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{self.height - BOTTOM}"/>')
            side = "end" if at > width * 0.7 else "start"
            shift = -5 if side == "end" else 5
            place = f'x="{at + shift:.1f}" y="{TOP + 10}" text-anchor="{side}"'
            drawn.append(f'<text class="mark" {place}>{escape(mark.text)}</text>')
        for mark in self.y_marks:
            if mark.value <= y.high:
                at = y(mark.value)
                drawn.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
                beside = at - 5 if at - TOP > 20 else at + 14
                drawn.append(f'<text class="mark" x="{LEFT + 6}" y="{beside:.1f}">{escape(mark.text)}</text>')
        return drawn


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to positions."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False
    ticks: Sequence[float] = field(default_factory=tuple)

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        begin: float,
        end: float,
        *,
        is_log: bool,
        has_zero: bool,
        top: float | None = None,
    ) -> Scale:
        """That holds all values, with round ticks inside."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
        low, high = (min(finite), max(finite)) if finite else ((0.1, 1.0) if is_log else (0.0, 1.0))
        if is_log:
            low, high = (low * 0.8, high * 1.25) if high < 1.3 * low else (low, high)
            inside = [tick for tick in _log_ticks(low, high) if low * 0.999 <= tick <= high * 1.001]
            return cls(low, high, begin, end, True, inside)
        low = min(low, 0.0) if has_zero else low
        high = top if top is not None else max(high, low + 1e-9)
        ticks = _linear_ticks(low, high)
        if has_zero and top is None:
            high = max(high * 1.04, ticks[-1])
        return cls(low, high, begin, end, False, [tick for tick in ticks if low <= tick <= high])

    def __call__(self, value: float) -> float:
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + min(1.0, share) * (self.end - self.begin)


def told(value: float) -> str:
    """A number, short."""
    if value and abs(value) < 0.01:
        return f"{value:.1g}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _drawn_line(line: Line, x: Scale, y: Scale) -> str:
    places = [(x(a), y(b)) for a, b in line.points]
    if not places:
        return ""
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    drawn = f'<g class="c{line.colour}">'
    if line.is_filled:
        drawn += f'<path class="area" d="{path}L{places[-1][0]:.1f} {y.begin:.1f}L{places[0][0]:.1f} {y.begin:.1f}Z"/>'
    drawn += f'<path class="curve{" dashed" if line.is_dashed else ""}" d="{path}"/>'
    if line.has_dots:
        for (a, b), point in zip(places, line.points):
            words = escape(f"{line.name}: {told(point[1])} at {told(point[0])}")
            drawn += f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3.6"><title>{words}</title></circle>'
    return drawn + "</g>"


def _key(one: Line | Bars) -> str:
    kind = "block" if isinstance(one, Bars) else "dashed" if one.is_dashed else ""
    return f'<span class="key c{one.colour} {kind}">{escape(one.name)}</span>'


def _drawn_bars(bars: Bars, x: Scale, y: Scale) -> str:
    drawn = ""
    for at, height in bars.points:
        if height:
            left, top = x(at), y(height)
            wide, tall = max(1.0, x(at + bars.width) - left - 0.5), y.begin - top
            drawn += f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>'
    return f'<g class="c{bars.colour}">{drawn}</g>'


def _wants_log(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return len(positive) == len(values) and bool(values) and max(positive) > LOG_FROM * min(positive)


def _linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2.5
    for factors in ((1,), (1, 3)) if wide else ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [factor * 10.0**power for power in decades for factor in factors]
        if sum(low <= tick <= high for tick in ticks) >= 3:
            break
    return ticks
