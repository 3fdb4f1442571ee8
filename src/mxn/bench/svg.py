"""Line charts as inline SVG, coloured by the page's own style sheet, without any library or outside resource."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 14, 48
NUM_COLOURS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A named line. points: (x, y, what to show when the mouse is over it); y None leaves a gap."""

    name: str
    points: tuple[tuple[float, float | None, str], ...]
    has_dots: bool = True


def chart(series: Sequence[Series], *, x_title: str, y_title: str, width: int = 640) -> str:
    """A chart with grid, axes from 0 and legend; a sentence instead where there is nothing to draw."""
    xs = [x for one in series for x, y, _ in one.points if y is not None]
    ys = [y for one in series for _, y, _ in one.points if y is not None]
    if not xs:
        return '<p class="none">Nothing to draw: no record has both figures.</p>'
    x_ticks, y_ticks = _ticks(max(xs)), _ticks(max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        share_x = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        share_y = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + share_x * (width - _LEFT - _RIGHT), HEIGHT - _BOTTOM - share_y * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">']
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}">{_label(tick)}</text>')
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{width - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick right" x="{_LEFT - 8}" y="{y + 4:.1f}">{_label(tick)}</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{HEIGHT - 10}">{escape(x_title)}</text>'
        f'<text class="axis" transform="translate(15 {(HEIGHT - _BOTTOM + _TOP) / 2:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    for number, one in enumerate(series):
        parts += _line(one, number % NUM_COLOURS, place)
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="swatch c{number % NUM_COLOURS}"></i>{escape(one.name)}</span>'
        for number, one in enumerate(series)
    )
    return f'<figure>{"".join(parts)}<figcaption class="legend">{legend}</figcaption></figure>'


def _line(one: Series, colour: int, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    parts: list[str] = []
    stretch: list[str] = []
    for x, y, _ in (*one.points, (0.0, None, "")):
        if y is not None:
            stretch.append("{:.1f},{:.1f}".format(*place(x, y)))
        elif stretch:
            if len(stretch) > 1:
                parts.append(f'<polyline class="line c{colour}" points="{" ".join(stretch)}"/>')
            stretch = []
    if one.has_dots:
        for x, y, text in one.points:
            if y is not None:
                px, py = place(x, y)
                title = f"<title>{escape(text)}</title>"
                parts.append(f'<circle class="dot c{colour}" cx="{px:.1f}" cy="{py:.1f}" r="4">{title}</circle>')
    return parts


def _ticks(high: float) -> list[float]:
    """Round values from 0 that reach `high`, four to seven of them."""
    raw = max(high, 1e-9) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [step * i for i in range(max(math.ceil(high / step - 1e-9), 1) + 1)]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
