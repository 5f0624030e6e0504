"""Labelled marks in a plane as an SVG picture, written by hand like the bars of `_plot.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 46, 640, 380  # pixels, of the plane
_TOTAL = (_LEFT + _WIDTH + 130, _TOP + _HEIGHT + 76)
_LINE = 14  # between labels
_COLOURS = ("#2a6fbb", "#d9822b", "#3a9a5b", "#b0413e", "#7a5ab5", "#8a6d3b", "#c65b9b", "#5f6b73", "#1b9aaa")


@dataclass(frozen=True)
class Mark:
    """A point with its label; marks of one group have one colour."""

    label: str
    group: str
    x: float
    y: float


@dataclass(frozen=True)
class _Axis:
    """Numbers from `lowest` to `highest` on pixels from `start`, `length` of them, and where ticks are."""

    lowest: float
    highest: float
    start: float
    length: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + self.length * (value - self.lowest) / (self.highest - self.lowest)


def scatter(marks: Sequence[Mark], title: str, axes: tuple[str, str], caption: str) -> str:
    """The marks over named axes, as SVG text."""
    x = _axis([mark.x for mark in marks], _LEFT, _WIDTH)
    y = _axis([mark.y for mark in marks], _TOP + _HEIGHT, -_HEIGHT)
    bottom, middle = _TOP + _HEIGHT, _TOP + _HEIGHT / 2
    parts = [f'<text x="16" y="26" font-weight="bold">{escape(title)}</text>']
    for tick in x.ticks:
        parts.append(_rule(x(tick), _TOP, x(tick), bottom))
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks:
        parts.append(_rule(_LEFT, y(tick), _LEFT + _WIDTH, y(tick)))
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">{escape(axes[0])}</text>'
    )
    turned = f'transform="rotate(-90 18 {middle})" text-anchor="middle"'
    parts.append(f'<text x="18" y="{middle}" {turned}>{escape(axes[1])}</text>')
    parts += _marks(marks, x, y)
    parts.append(f'<text x="16" y="{bottom + 64}" fill="#666666">{escape(caption)}</text>')
    width, height = _TOTAL
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _axis(values: Sequence[float], start: float, length: float) -> _Axis:
    """All values, with round numbers at both ends and about five ticks."""
    lowest, highest = min(values, default=0.0), max(values, default=1.0)
    span = (highest - lowest) or max(abs(highest), 1.0) / 2
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 5)
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    last += first == last
    return _Axis(first * step, last * step, start, length, tuple(n * step for n in range(first, last + 1)))


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _marks(marks: Sequence[Mark], x: _Axis, y: _Axis) -> list[str]:
    """Circles and their labels, which move down where another one stands."""
    groups = list(dict.fromkeys(mark.group for mark in marks))
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: -mark.y):
        colour = _COLOURS[groups.index(mark.group) % len(_COLOURS)]
        left, base = x(mark.x) + 9, y(mark.y) + 4
        while any(abs(left - other) < 110 and abs(base - height) < _LINE for other, height in taken):
            base += 2
        taken.append((left, base))
        parts.append(f'<circle cx="{x(mark.x):.1f}" cy="{y(mark.y):.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{left:.1f}" y="{base:.1f}" fill="{colour}">{escape(mark.label)}</text>')
    return parts
