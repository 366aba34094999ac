"""Plots of metrics on matplotlib axes: with units, at the size of a paper's column, readable also without colour.

All functions draw fractions as per cent, with the colours that matplotlib is configured for: those of a style within
``in_style``. matplotlib is imported with the first plot. Sizes are in inches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from dcl_lightning.errors import ConfigurationError, suggestion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "CURVE_SIZE", "OKABE_ITO", "class_size", "confusion_size", "draw_classes", "draw_confusion", "draw_curves",
    "draw_fill", "draw_matrix", "draw_multiples", "draw_rows", "draw_task_curves", "figure_of", "in_style", "in_words",
    "matrix_size", "multiples_size", "new_axes", "refuse_unknown_style", "shortened",
]  # fmt: skip

Floats = npt.NDArray[np.float64]

CURVE_SIZE = (5.2, 3.4)
_FONT = 8
_NAMED = 8  # curves that differ in dashes and markers
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vX*P"
# Okabe and Ito's colours, which people with any kind of colour vision tell apart; their yellow is too light for lines.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_GREYS = ("black", "0.35", "0.6")
_PRINT_CURVES = 24  # greys, dashes and markers repeat together after as many
_LIGHTEST = 0.93  # luminance of the lightest shade of a map: zero has to differ from a white cell
_LIGHTEST_LINE = 0.75
_LONGEST = 20  # characters of a class's name
_CELL = {10: 0.46, 20: 0.34}  # side of a cell with its value in it, by number of tasks


def new_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure of pyplot."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


@contextmanager
def in_style(style: str) -> Iterator[None]:
    """Draw in a style within the block.

    Args:
        style: ``colour``, perceptually even and told apart by colour-blind readers; ``print``, shades of grey; or a
            style of matplotlib's by its name or the path of its file, over ``colour``.
    """
    from cycler import cycler
    from matplotlib.style import context

    colour = {"image.cmap": "viridis", "axes.prop_cycle": cycler(color=OKABE_ITO), "grid.color": "0.85"}
    greys = cycler(
        color=[_GREYS[k % 3] for k in range(_PRINT_CURVES)],
        linestyle=[_DASHES[k % 4] for k in range(_PRINT_CURVES)],
        marker=[_MARKERS[k % 8] for k in range(_PRINT_CURVES)],
    )
    over: Any = {"image.cmap": "Greys", "axes.prop_cycle": greys} if style == "print" else style
    with context([colour] if style == "colour" else [colour, over], after_reset=style in ("colour", "print")):
        yield


def refuse_unknown_style(style: str, option: str) -> None:
    """Refuse a style that ``in_style`` cannot use; accept any where matplotlib is not installed.

    Args:
        style: the style.
        option: where it was given, for the message.

    Raises:
        ConfigurationError: matplotlib has no such style.
    """
    try:
        from matplotlib.style import available
    except ImportError:
        return
    if style in ("colour", "print", "default"):
        return
    if style not in available and not Path(style).expanduser().is_file():
        near = suggestion(style, ["colour", "print", *available])
        raise ConfigurationError(
            f"{option}={style}: give colour, print, or the name or file of a style of matplotlib{near}"
        )
    try:
        with in_style(style):
            pass
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{option}={style} cannot be used: {str(error).partition(chr(10))[0]}") from error


def figure_of(ax: Axes) -> Figure:
    """Return the figure that axes belong to."""
    return cast("Figure", ax.figure)  # not a subfigure


def in_words(name: str) -> str:
    """Return the name of a class as words: ``AverageAccuracy`` as ``average accuracy``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def shortened(label: object) -> str:
    """Return a class's name in at most twenty characters, from both ends of a longer one."""
    text = " ".join(str(label).split())
    half = _LONGEST // 2
    text = text if len(text) <= _LONGEST else text[:half] + "…" + text[1 - half :]
    return text.replace("$", r"\$")  # matplotlib typesets text between two of these as a formula


# -- heat maps ---------------------------------------------------------------------------------------


def matrix_size(num_tasks: int) -> tuple[float, float]:
    """Return width and height of a figure for an accuracy matrix."""
    cell = next((side for most, side in _CELL.items() if num_tasks <= most), None)
    side = 4.6 if cell is None else max(cell * num_tasks, 2.2)
    return 1.1 * side + 1.6, side + 0.7


def draw_matrix(ax: Axes, values: Floats, samples: str = "test samples") -> None:
    """Draw an accuracy matrix, with its values in the cells up to twenty tasks; cells not evaluated stay white.

    Args:
        ax: axes.
        values: ``(T, T)`` fractions, NaN where not evaluated.
        samples: what was evaluated, in words.
    """
    size = len(values)
    decimals = None if size > 20 else 1 if size <= 10 else 0
    _heat(ax, 100 * values, 100.0, "accuracy (%)", decimals)
    _task_ticks(ax, size, "x")
    _task_ticks(ax, size, "y")
    ax.set_xlabel(f"{samples} of task", fontsize=_FONT + 1)
    ax.set_ylabel("after learning task", fontsize=_FONT + 1)


def class_size(num_tasks: int, labels: Sequence[str]) -> tuple[float, float]:
    """Return width and height of a figure with a row for each class and a column for each task."""
    width = min(max(0.46 * num_tasks, 2.2), 5.0) + 1.5 + _text_width(labels)
    return width, min(max(0.2 * len(labels), 1.6), 6.0) + 0.7


def draw_classes(ax: Axes, values: Floats, labels: Sequence[str]) -> None:
    """Draw the accuracy of every class (row) after every task (column).

    Args:
        ax: axes.
        values: ``(T, K)`` fractions, NaN where not evaluated.
        labels: names of the K classes.
    """
    decimals = 0 if values.shape[0] <= 10 and len(labels) <= 30 else None
    _heat(ax, 100 * values.T, 100.0, "accuracy (%)", decimals, equal=False)
    _axes_of_classes(ax, len(values), labels)


def draw_rows(ax: Axes, counts: Floats, labels: Sequence[str]) -> None:
    """Draw the memory's rows of every class (row) after every task (column).

    Args:
        ax: axes.
        counts: ``(T, K)``.
        labels: names of the K classes.
    """
    shown = np.where(counts > 0, counts, np.nan).T.astype(np.float64)
    most = max(float(counts.max()), 1.0)
    decimals = 0 if len(counts) <= 10 and len(labels) <= 30 and most < 10_000 else None
    _heat(ax, shown, most, "rows stored", decimals, equal=False)
    _axes_of_classes(ax, len(counts), labels)


def confusion_size(labels: Sequence[str]) -> tuple[float, float]:
    """Return width and height of a figure for a confusion matrix."""
    side, beside = min(max(0.3 * len(labels), 2.2), 5.0), _text_width(labels)
    return 1.1 * side + 1.6 + beside, side + 0.8 + beside


def draw_confusion(ax: Axes, counts: Floats, labels: Sequence[str]) -> None:
    """Draw a confusion matrix, each row as shares of the class's samples.

    Args:
        ax: axes.
        counts: ``(K, K)``, samples of class y (row) predicted as k (column).
        labels: names of the K classes.
    """
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    _heat(ax, shares, 100.0, "share of the class's samples (%)", 0 if len(labels) <= 15 else None)
    _class_ticks(ax, labels, "x")
    _class_ticks(ax, labels, "y")
    ax.set_xlabel("predicted class", fontsize=_FONT + 1)
    ax.set_ylabel("class", fontsize=_FONT + 1)


def _heat(ax: Axes, values: Floats, most: float, label: str, decimals: int | None, equal: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    shades = _shades(_LIGHTEST)
    image = ax.imshow(
        values, cmap=shades, vmin=0.0, vmax=most, aspect="equal" if equal else "auto", interpolation="nearest"
    )
    if decimals is not None:
        light = _luminance(shades(values / most))
        for i, j in np.argwhere(~np.isnan(values)):
            ink = "white" if light[i, j] < 0.5 else "black"
            text = f"{values[i, j]:.{decimals}f}"
            ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=_FONT - 1, clip_on=True)
    bar = figure_of(ax).colorbar(image, ax=ax, fraction=0.06, pad=0.03, ticks=MaxNLocator(5, integer=True))
    bar.set_label(label, fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT)
    ax.tick_params(labelsize=_FONT, length=2)


def _shades(lightest: float) -> Colormap:
    """Return matplotlib's configured colour map without the colours that are lighter than a luminance."""
    from matplotlib import colormaps, rcParams
    from matplotlib.colors import LinearSegmentedColormap

    colours = colormaps[rcParams["image.cmap"]](np.linspace(0, 1, 256))
    kept = colours[_luminance(colours) <= lightest]
    return LinearSegmentedColormap.from_list("shades", kept if len(kept) > 1 else colours)


def _luminance(colours: Floats) -> Floats:
    """Return how light ``(..., 4)`` colours are, from 0 to 1, as a grey print shows them (Rec. 601)."""
    return colours[..., :3] @ np.array([0.299, 0.587, 0.114])


def _axes_of_classes(ax: Axes, num_tasks: int, labels: Sequence[str]) -> None:
    _task_ticks(ax, num_tasks, "x")
    _class_ticks(ax, labels, "y")
    ax.set_xlabel("after learning task", fontsize=_FONT + 1)
    ax.set_ylabel("class", fontsize=_FONT + 1)


def _task_ticks(ax: Axes, size: int, axis: Literal["x", "y"]) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, size) if size <= 20 * s)
    ax.set(**{f"{axis}ticks": range(0, size, step)})


def _class_ticks(ax: Axes, labels: Sequence[str], axis: Literal["x", "y"]) -> None:
    step = -(-len(labels) // 30)
    places = range(0, len(labels), step)
    ax.set(**{f"{axis}ticks": places, f"{axis}ticklabels": [shortened(labels[y]) for y in places]})
    upright = axis == "x" and max(len(str(label)) for label in labels) > 2
    ax.tick_params(axis=axis, rotation=90 if upright else 0)


def _text_width(labels: Sequence[str]) -> float:
    return 0.072 * max(len(shortened(label)) for label in labels)


# -- curves ------------------------------------------------------------------------------------------


def draw_curves(
    ax: Axes, curves: Mapping[str, Floats], label: str, deviations: Mapping[str, Floats] | None = None
) -> None:
    """Draw metrics over the tasks, with different colours, dashes and markers.

    Args:
        ax: axes.
        curves: ``(t,)`` fractions by name, NaN where undefined.
        label: of the vertical axis.
        deviations: ``(t,)`` fractions by the names of some curves, drawn as bars to both sides.
    """
    for number, (name, values) in enumerate(curves.items()):
        ax.plot(100 * values, label=name, **_line(number))
        _bars(ax, values, (deviations or {}).get(name), number)
    _curve_axes(ax, max(len(values) for values in curves.values()), label)
    ax.set_ylim(*_limits(curves))
    if len(curves) > 1:
        _legend(ax)


def multiples_size(count: int) -> tuple[float, float]:
    """Return width and height of a figure for the small multiples of ``count`` curves."""
    columns = min(count, 4)
    return 1.9 * columns + 0.6, 1.5 * -(-count // columns) + 0.6


def draw_multiples(
    figure: Figure, curves: Mapping[str, Floats], label: str, deviations: Mapping[str, Floats] | None = None
) -> None:
    """Draw each curve on axes of its own, before all others in grey.

    Args:
        figure: without axes.
        curves: ``(t,)`` fractions by name, NaN where undefined.
        label: of the vertical axis.
        deviations: ``(t,)`` fractions by the names of some curves, drawn as bars to both sides.
    """
    columns = min(len(curves), 4)
    grid = figure.subplots(-(-len(curves) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(curves) :]:
        ax.set_axis_off()
    for ax, (name, values) in zip(grid.flat, curves.items(), strict=False):
        for other in curves.values():
            ax.plot(100 * other, color="0.8", lw=0.7, zorder=1)
        ax.plot(100 * values, **(_line(0) | {"ms": 3}))
        _bars(ax, values, (deviations or {}).get(name), 0)
        _curve_axes(ax, max(map(len, curves.values())), "")
        ax.set_xlabel("")
        ax.set_title(name, fontsize=_FONT)
        ax.set_ylim(*_limits(curves))
    figure.supxlabel("after learning task", fontsize=_FONT + 1)
    figure.supylabel(label, fontsize=_FONT + 1)


def _limits(curves: Mapping[str, Floats]) -> tuple[float, float]:
    lowest = min((float(np.nanmin(v)) for v in curves.values() if not np.isnan(v).all()), default=0.0)
    return min(-3.0, 100 * lowest - 3), 103.0


def _bars(ax: Axes, values: Floats, deviations: Floats | None, number: int) -> None:
    if deviations is not None:
        colour = _line(number)["color"]
        ax.errorbar(
            range(len(values)), 100 * values, 100 * deviations, fmt="none", ecolor=colour, capsize=2, lw=0.8, alpha=0.6
        )


def draw_task_curves(ax: Axes, matrix: Floats) -> None:
    """Draw the accuracy on each task over the stream, and the mean over the tasks learnt.

    Args:
        ax: axes.
        matrix: ``(T, T)`` fractions, NaN where not evaluated; entries above the diagonal are left out.
    """
    from matplotlib import rcParams
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    size = len(matrix)
    learnt = np.where(np.tri(size, dtype=bool), matrix, np.nan)
    known = ~np.isnan(learnt)
    mean = np.divide(np.nansum(learnt, 1), known.sum(1), out=np.full(size, np.nan), where=known.any(1))
    shade = ScalarMappable(Normalize(0, max(size - 1, 1)), _shades(_LIGHTEST_LINE))
    for j in range(size):
        style = _line(j) if size <= _NAMED else {"color": shade.to_rgba(np.array(j)), "lw": 0.8, "marker": ".", "ms": 3}
        ax.plot(100 * learnt[:, j], label=f"task {j}" if size <= _NAMED else None, **style)
    if size > 1:
        look = {"color": rcParams["text.color"], "lw": 2.6, "ls": "-", "marker": ""}
        ax.plot(100 * mean, label="mean over tasks learnt", zorder=3, **look)
    _curve_axes(ax, size, "accuracy on the task (%)")
    ax.set_ylim(-3.0, 103.0)
    if size > _NAMED:
        bar = figure_of(ax).colorbar(shade, ax=ax, fraction=0.06, pad=0.03, ticks=MaxNLocator(5, integer=True))
        bar.set_label("task", fontsize=_FONT)
        bar.ax.tick_params(labelsize=_FONT)
    _legend(ax)


def draw_fill(ax: Axes, stored: Floats, nominal: float) -> None:
    """Draw the memory's rows after each task, and its capacity.

    Args:
        ax: axes.
        stored: ``(t,)`` rows.
        nominal: capacity in rows.
    """
    from matplotlib import rcParams

    ax.bar(np.arange(len(stored)), stored, color=_line(0)["color"], alpha=0.6, label="stored")
    ax.axhline(nominal, color=rcParams["text.color"], ls="--", lw=1.2, label="capacity")
    _curve_axes(ax, len(stored), "rows stored")
    ax.set_ylim(0, 1.08 * max(nominal, float(stored.max()), 1.0))
    _legend(ax)


def _line(number: int) -> dict[str, Any]:
    """Return the look of a curve: as matplotlib is configured, with a marker and dashes that repeat at other times."""
    from matplotlib import rcParams

    cycle = list(rcParams["axes.prop_cycle"])
    # Open markers stay visible where points coincide.
    look = {"ls": _DASHES[number // len(cycle) % 4], "marker": _MARKERS[number % 8], "ms": 5, "lw": 1.3}
    configured = {{"linestyle": "ls"}.get(name, name): value for name, value in cycle[number % len(cycle)].items()}
    return look | {"mfc": rcParams["axes.facecolor"], "color": rcParams["text.color"]} | configured


def _curve_axes(ax: Axes, size: int, label: str) -> None:
    ax.set_xlabel("after learning task", fontsize=_FONT + 1)
    ax.set_ylabel(label, fontsize=_FONT + 1)
    ax.set_xlim(-0.5, size - 0.5)
    _task_ticks(ax, size, "x")
    ax.tick_params(labelsize=_FONT)
    ax.grid(axis="y", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes) -> None:
    entries = len(ax.get_legend_handles_labels()[1])
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=1 if entries < 2 else 2 if entries < 5 else 3, fontsize=_FONT,
        frameon=False, borderaxespad=0.2, handlelength=2.6,
    )  # fmt: skip
