"""One panel as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from proma_megatron.figures.panels import Panel
from proma_megatron.figures.series import Series
from proma_megatron.figures.words import number

WIDTH, HEIGHT = 520, 310  # of the whole drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 40  # margins of the plot in it


class Frame(NamedTuple):
    """The values at the plot's edges; the script reads it by these names."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def frame_of(lines: Sequence[Series]) -> Frame | None:
    """Frame all lines and bands, from 0 up unless a value is below; None without a point."""
    points = [point for line in lines for point in line.points]
    if not points:
        return None
    first, last = min(p.step for p in points), max(p.step for p in points)
    if first == last:
        first, last = first - 1, last + 1
    low, high = min(p.low for p in points), max(p.high for p in points)
    room = 0.05 * (high - min(low, 0.0))
    bottom = 0.0 if low >= 0 else low - room
    top = high + room if high + room > bottom else bottom + 1.0
    return Frame(first, last, bottom, top)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers within these bounds: steps are 1, 2 or 5 times 10^n."""
    least = 0.75 * (high - low) / count
    power = 10.0 ** math.floor(math.log10(least))
    width = next(power * f for f in (1, 2, 5, 10) if power * f >= least)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [float(f"{place * width:.10g}") for place in range(first, last + 1)]


def draw_panel(
    panel: Panel,
    lines: Sequence[Series],
    frame: Frame | None,
    name: str,
    color: Callable[[int], str],
    dash: Callable[[int], str],
) -> Iterator[str]:
    """Yield the lines of the panel's SVG element.

    Args:
        frame: of `frame_of`; None: the panel says "not recorded".
        name: unique in the page.
        color, dash: of a line's number, for its ``stroke`` and ``stroke-dasharray``.
    """
    yield (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(_description(panel, lines))}">'
    )
    yield f"<title>{escape(panel.title)}</title>"
    middle = (LEFT + WIDTH - RIGHT) / 2
    if frame is None:
        yield f'<text class="absent" x="{middle}" y="{HEIGHT / 2}">not recorded</text></svg>'
        return
    yield f'<clipPath id="{name}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
    yield f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    yield from _axes(panel, frame)
    for index, line in enumerate(lines):
        if line.points:
            yield f'<g data-group="{index}">'
            yield from _line(line, frame, name, color(index), dash(index))
            yield "</g>"
    yield f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
    yield "</svg>"


def _description(panel: Panel, lines: Sequence[Series]) -> str:
    """Return what a screen reader says in place of the drawing."""
    ends = [
        f"{line.label} {number(line.points[-1].mean)} at step {line.points[-1].step}"
        for line in lines
        if line.points
    ]
    return f"{panel.title}, {panel.unit}, over RL steps: {'; '.join(ends) or 'not recorded'}"


def _axes(panel: Panel, frame: Frame) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in ticks(frame.y0, frame.y1, 5):
        y, text = _at(frame.y(value)), f"{100 * value:.4g}%" if panel.percent else f"{value:.4g}"
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{y}" dy="0.35em">{text}</text>'
    for step in ticks(frame.x0, frame.x1, 6):
        if step == round(step):  # there is no half step
            x = _at(frame.x(step))
            yield f'<text class="step" x="{x}" y="{bottom + 16}">{step:.0f}</text>'
            yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    yield f'<text class="step" x="{middle_x}" y="{HEIGHT - 6}">RL step</text>'
    yield (
        f'<text class="step" transform="translate(13 {middle_y}) rotate(-90)">'
        f"{escape(panel.unit)}</text>"
    )


def _line(line: Series, frame: Frame, clip: str, color: str, dash: str) -> Iterator[str]:
    shape = f'clip-path="url(#{clip})" style="--c: {color}"'
    if line.banded:
        above = [(frame.x(p.step), frame.y(p.high)) for p in line.points]
        below = [(frame.x(p.step), frame.y(p.low)) for p in reversed(line.points)]
        yield f'<path class="band" {shape} d="{_path(above + below)}Z"/>'
    means = [(frame.x(p.step), frame.y(p.mean)) for p in line.points]
    yield f'<path class="mean" {shape} stroke-dasharray="{dash}" d="{_path(means)}"/>'
    if len(means) == 1:  # a path of one point is invisible
        x, y = means[0]
        yield f'<circle style="fill: {color}" cx="{_at(x)}" cy="{_at(y)}" r="3"/>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_at(x)} {_at(y)}" for x, y in places)


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")
