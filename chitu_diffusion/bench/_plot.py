"""Horizontal bars as an SVG picture, written by hand: no plotting package, and a diff shows what changed."""

from dataclasses import dataclass
from xml.sax.saxutils import escape

_LEFT, _BAR_WIDTH, _ROW_HEIGHT, _WIDTH = 140, 360, 26, 820  # pixels
_COLOURS = ("#d9822b", "#2a6fbb")


@dataclass(frozen=True)
class Bar:
    """One bar, the text beside it, and whether it has the colour of the exact ones."""

    name: str
    value: float
    label: str
    is_exact: bool


@dataclass(frozen=True)
class Panel:
    """Bars that share a scale, longest value first or not, as they come."""

    title: str
    bars: tuple[Bar, ...]


def draw(panels: list[Panel], caption: str) -> str:
    """The panels, one below the other, as SVG text."""
    parts, y = [], 30.0
    for panel in panels:
        parts.append(f'<text x="16" y="{y:.0f}" font-weight="bold">{escape(panel.title)}</text>')
        y += 14
        highest = max((bar.value for bar in panel.bars), default=1.0)
        for bar in panel.bars:
            parts += _row(bar, y, _BAR_WIDTH * bar.value / highest)
            y += _ROW_HEIGHT
        y += 34
    parts.append(f'<text x="16" y="{y - 6:.0f}" fill="#666666">{escape(caption)}</text>')
    size = f'width="{_WIDTH}" height="{y + 10:.0f}" viewBox="0 0 {_WIDTH} {y + 10:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _row(bar: Bar, top: float, length: float) -> list[str]:
    colour, base = _COLOURS[bar.is_exact], top + _ROW_HEIGHT / 2 + 4
    box = f'x="{_LEFT}" y="{top + 3:.0f}" width="{length:.1f}" height="{_ROW_HEIGHT - 6}"'
    return [
        f'<text x="{_LEFT - 8}" y="{base:.0f}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect {box} fill="{colour}"/>',
        f'<text x="{_LEFT + length + 8:.1f}" y="{base:.0f}">{escape(bar.label)}</text>',
    ]
