"""Curves and bars as inline SVG, whose marks say their values on hover and by keyboard. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from dcl_lightning.metrics.drawing import OKABE_ITO
from dcl_lightning.report.page.colours import STEPS

__all__ = ["Curve", "bars", "curves", "numbered", "stepped"]

_WIDTH, _HEIGHT = 440, 280  # of the drawing; a page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 40
_MARKED = 20  # tasks up to which curves have a mark for each value: beyond, the matrix shows them
# As matplotlib's o, s, D, ^, v, X, * and P, which the pictures' curves have in this order.
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5L5 0L0 5L-5 0z",
    "M0-4.5L4.5 3.5h-9z",
    "M0 4.5L4.5-3.5h-9z",
    "M-4-2L-2-4L0-2L2-4L4-2L2 0L4 2L2 4L0 2L-2 4L-4 2L-2 0z",
    "M0-5.5L1.6-1.8L5.5-1.6L2.5 1L3.5 5L0 2.8L-3.5 5L-2.5 1L-5.5-1.6L-1.6-1.8z",
    "M-1.6-4.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2v-2.9h-2.9v-3.2h2.9z",
)
_DASHES = ("", "7 3", "7 3 1.5 3", "2 3")


class Curve(NamedTuple):
    """One curve.

    Args:
        name: in the legend, and in what its marks say.
        values: fractions after each task, None where there is none.
        colour: a class of the style sheet.
        marker: number of its mark; None for none.
        dashes: number of its dashes.
    """

    name: str
    values: Sequence[float | None]
    colour: str
    marker: int | None = 0
    dashes: int = 0


def numbered(number: int, name: str, values: Sequence[float | None]) -> Curve:
    """Return a curve whose colour, mark and dashes go by its number.

    Args:
        number: from 0.
        name: in the legend.
        values: fractions.
    """
    dashes = number // len(OKABE_ITO) % len(_DASHES)
    return Curve(name, values, f"k{number % len(OKABE_ITO)}", number % len(_MARKERS), dashes)


def stepped(number: int, of: int, name: str, values: Sequence[float | None]) -> Curve:
    """Return a curve whose colour is a step on a scale, for more curves than there are colours.

    Args:
        number: from 0.
        of: how many curves there are.
        name: in what its marks say.
        values: fractions.
    """
    return Curve(name, values, _step(number, of), 0 if len(values) <= _MARKED else None)


def curves(shown: Sequence[Curve], label: str, legend: bool = True) -> str:
    """Return curves over the tasks, in per cent, with a legend whose buttons hide and show them.

    Args:
        shown: at least one.
        label: of the vertical axis.
        legend: False for a scale of steps in its place.
    """
    size = max(len(curve.values) for curve in shown)
    known = [100 * value for curve in shown for value in curve.values if value is not None]
    low = min([-2.0, *(value - 2 for value in known)])
    parts = _axes(size, label, low, 102.0, range(-100, 101, 20), "after learning task")
    focus = _Focus()
    for k, curve in enumerate(shown):
        points = [(i, 100 * value) for i, value in enumerate(curve.values) if value is not None]
        places = [f"{_x(i, size):.1f} {_y(value, low, 102.0):.1f}" for i, value in points]
        dashes = f' stroke-dasharray="{_DASHES[curve.dashes]}"' if curve.dashes else ""
        parts.append(f'<g class="row {curve.colour}" data-curve="{k}">')
        parts.append(f'<polyline points="{" ".join(places)}"{dashes}/>')
        for (i, value), place in zip(points, places, strict=True):
            if curve.marker is not None:
                said = escape(f"{curve.name} after task {i}: {value:.1f} %")
                mark = f'transform="translate({place})" d="{_MARKERS[curve.marker]}"'
                parts.append(f'<path class="pt" data-i="{i}"{next(focus)} role="img" aria-label="{said}" {mark}/>')
        parts.append("</g>")
    below = _legend(shown) if legend else _scale([curve for curve in shown if curve.colour[0] == "g"])
    return _figure(parts, label, below)


def bars(
    amounts: Mapping[int, Mapping[int, int]], size: int, line: int | None, labels: tuple[str, str, str], says: str
) -> str:
    """Return a stack of amounts for each task, by their origins.

    Args:
        amounts: by task, then by origin.
        size: number of tasks.
        line: where a dashed line goes; None for none.
        labels: of the vertical axis, of the line, and of one origin.
        says: what a piece says; ``{task}``, ``{origin}``, ``{amount}`` and ``{all}`` stand for its numbers.
    """
    totals = {task: sum(parts.values()) for task, parts in amounts.items()}
    most = 1.08 * max([1, line or 0, *totals.values()])
    step = next(s * 10**e for e in range(12) for s in (1, 2, 5) if most / (s * 10**e) <= 6)
    parts = _axes(size, labels[0], 0.0, most, range(0, int(most) + 1, step), "after learning task")
    width, focus = 0.72 * (_WIDTH - _LEFT - _RIGHT) / size, _Focus()
    for task, pieces in sorted(amounts.items()):
        parts.append('<g class="row across">')
        below = 0
        for origin, amount in sorted(pieces.items()):
            top, bottom = _y(below + amount, 0.0, most), _y(below, 0.0, most)
            numbers = {"task": task, "origin": origin, "amount": amount, "all": totals[task]}
            place = (
                f'x="{_x(task, size) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}"'
            )
            parts.append(
                f'<rect class="pt {_step(origin, size)}" data-i="{origin}"{next(focus)} role="img"'
                f' aria-label="{escape(says.format(**numbers))}" {place}/>'
            )
            below += amount
        parts.append("</g>")
    names = [Curve(f"{labels[2]} {origin}", [], _step(origin, size)) for origin in range(size)]
    keys = ""
    if line is not None:
        y = _y(line, 0.0, most)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        swatch = (
            '<svg width="26" height="12" aria-hidden="true"><line class="limit" x1="1" x2="25" y1="6" y2="6"/></svg>'
        )
        keys = f'<span class="key">{swatch}{escape(labels[1])}: {line}</span>'
    return _figure(parts, labels[0], _scale(names, keys))


class _Focus:
    """The first mark of a drawing is reached by the Tab key, the others by arrows from there."""

    def __init__(self) -> None:
        self._taken = False

    def __next__(self) -> str:
        taken, self._taken = self._taken, True
        return "" if taken else ' tabindex="0"'


def _step(number: int, of: int) -> str:
    return f"g{round(number / max(of - 1, 1) * STEPS)}"


def _x(task: float, size: int) -> float:
    return _LEFT + (task + 0.5) / size * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(size: int, label: str, low: float, high: float, ticks: range, below: str) -> list[str]:
    parts = []
    for tick in ticks:
        if low <= tick <= high:
            y = _y(tick, low, high)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, size) if size <= 12 * s)
    base = _HEIGHT - _BOTTOM
    for task in range(0, size, step):
        parts.append(f'<text x="{_x(task, size):.1f}" y="{base + 16}" text-anchor="middle">{task}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(below)}</text>')
    upright = f'transform="translate(12 {(_TOP + base) / 2}) rotate(-90)"'
    return [*parts, f'<text {upright} text-anchor="middle">{escape(label)}</text>']


def _figure(parts: Sequence[str], label: str, below: str) -> str:
    drawing = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="group" aria-label="{escape(label)}" data-grid>'
    )
    return f"<figure>{drawing}{''.join(parts)}</svg>{below}</figure>"


def _legend(shown: Sequence[Curve]) -> str:
    items = []
    for k, curve in enumerate(shown):
        dashes = f' stroke-dasharray="{_DASHES[curve.dashes]}"' if curve.dashes else ""
        mark = "" if curve.marker is None else f'<path transform="translate(13 6)" d="{_MARKERS[curve.marker]}"/>'
        swatch = f'<svg class="{curve.colour}" width="26" height="12" viewBox="0 0 26 12" aria-hidden="true">'
        swatch += f'<polyline points="0 6 26 6"{dashes}/>{mark}</svg>'
        items.append(
            f'<button type="button" aria-pressed="true" data-curve="{k}">{swatch}{escape(curve.name)}</button>'
        )
    return f'<div class="legend">{"".join(items)}</div>'


def _scale(shown: Sequence[Curve], more: str = "") -> str:
    ends = (escape(shown[0].name), escape(shown[-1].name))
    bar = f'<span class="key">{ends[0]}<i class="bar steps"></i>{ends[1]}</span>' if len(shown) > 1 else ""
    return f'<div class="legend">{bar}{more}</div>'
