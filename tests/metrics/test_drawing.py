"""Figures: every text lies inside and overlaps no other, for any number of tasks and any names."""

from __future__ import annotations

from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics import AccuracyMatrix, ClassAccuracy, Forgetting, drawing

matplotlib.use("Agg")

TASKS = [1, 2, 5, 8, 9, 10, 20, 50]
SHORT = [str(y) for y in range(100)]
LONG = [f"Strix nebulosa, the great grey owl number {y}" for y in range(100)]


def triangle(size):
    rng = np.random.default_rng(size)
    steps = np.arange(size)[:, None] - np.arange(size)
    return np.where(steps >= 0, np.clip(1.0 - 0.08 * steps + rng.normal(size=(size, size)) / 50, 0, 1), np.nan)


def texts_of(figure):
    """Visible texts and their boxes in pixels, of the figure as it is saved."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    # Ticks beyond an axis's limits are not drawn.
    return [(t, t.get_window_extent(renderer)) for t in shown if drawn(t)]


def drawn(text):
    axis = next((a for ax in text.figure.axes for a in (ax.xaxis, ax.yaxis) if text in a.get_ticklabels()), None)
    if axis is None:
        return True
    low, high = sorted(axis.get_view_interval())
    place = text.get_position()[0 if axis.axis_name == "x" else 1]
    return low - 1e-9 <= place <= high + 1e-9


def check(figure):
    texts = texts_of(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in texts:
        inside = box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
        assert inside, f"{text.get_text()!r} is cut off: {box}, figure {width} x {height}"
    for (one, a), (other, b) in combinations(texts, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one.get_text()!r} lies over {other.get_text()!r}: {a}, {b}"
    return [text.get_text() for text, _ in texts]


def figure_with(size, draw):
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return figure


@pytest.mark.parametrize("size", TASKS)
def test_accuracy_matrix(size):
    values = triangle(size)
    figure = figure_with(drawing.matrix_size(size), lambda ax: drawing.draw_matrix(ax, values))
    texts = check(figure)
    assert {"test samples of task", "after learning task", "accuracy (%)"} <= set(texts)
    cells = size * (size + 1) // 2
    assert len(figure.axes[0].texts) == (cells if size <= 20 else 0)


@pytest.mark.parametrize("size", TASKS)
def test_curves_of_tasks(size):
    texts = check(figure_with(drawing.CURVE_SIZE, lambda ax: drawing.draw_task_curves(ax, triangle(size))))
    assert "accuracy on the task (%)" in texts
    assert ("task" if size > 8 else f"task {size - 1}") in texts


@pytest.mark.parametrize("size", [1, 20, 50])
def test_curves_over_tasks(size):
    curve = np.linspace(1.0, 0.5, size)
    curves = {"average accuracy": curve, "accuracy over all samples": curve, "forgetting (max-last)": -curve / 4}
    texts = check(figure_with(drawing.CURVE_SIZE, lambda ax: drawing.draw_curves(ax, curves, "accuracy (%)")))
    assert set(curves) <= set(texts)


@pytest.mark.parametrize("size", [1, 5, 10, 50])
@pytest.mark.parametrize("labels", [SHORT, LONG], ids=["short", "long"])
def test_classes_memory_and_confusion(size, labels):
    labels = labels[: 2 * size]
    first = np.repeat(np.arange(size), 2)
    learnt = np.arange(size)[:, None] >= first
    values = np.where(learnt, 0.5, np.nan)
    texts = check(figure_with(drawing.class_size(size, labels), lambda ax: drawing.draw_classes(ax, values, labels)))
    assert drawing.shortened(labels[0]) in texts
    rows = np.where(learnt, 2000 // (2 * size), 0)
    texts = check(figure_with(drawing.class_size(size, labels), lambda ax: drawing.draw_rows(ax, rows, labels)))
    assert "rows stored" in texts
    check(figure_with(drawing.CURVE_SIZE, lambda ax: drawing.draw_fill(ax, rows.sum(1), 2000)))
    counts = np.random.default_rng(0).integers(0, 40, (2 * size, 2 * size))
    size_in = drawing.confusion_size(labels)
    texts = check(figure_with(size_in, lambda ax: drawing.draw_confusion(ax, counts, labels)))
    assert "predicted class" in texts


def test_the_check_itself_sees_what_is_cut_off_or_covered():
    figure = Figure(figsize=(2, 2))
    figure.text(0.95, 0.5, "too long for its place")
    with pytest.raises(AssertionError, match="cut off"):
        check(figure)
    figure = Figure(figsize=(4, 2))
    figure.text(0.4, 0.5, "one")
    figure.text(0.42, 0.5, "other")
    with pytest.raises(AssertionError, match="lies over"):
        check(figure)


def test_long_names_stay_different_and_formulas_text():
    short = [drawing.shortened(label) for label in LONG]
    assert len(set(short)) == len(LONG)
    assert max(map(len, short)) == 20
    assert drawing.shortened("$a$") == r"\$a\$"


@pytest.mark.parametrize("style", ["colour", "print"])
def test_what_was_not_evaluated_differs_from_zero(style):
    values = np.array([[0.0, np.nan], [0.0, 1.0]])
    with drawing.in_style(style):
        figure = figure_with((3, 3), lambda ax: drawing.draw_matrix(ax, values))
    image = figure.axes[0].images[0]
    shades = luminance(image.to_rgba(image.get_array()))
    assert shades[0, 0] < 0.97
    assert image.to_rgba(image.get_array())[0, 1, 3] == 0  # white paper shows through
    assert abs(shades[1, 1] - shades[0, 0]) > 0.5


def test_print_has_no_colour_and_needs_none():
    with drawing.in_style("print"):
        figure = figure_with(drawing.CURVE_SIZE, lambda ax: drawing.draw_task_curves(ax, triangle(8)))
        lines = figure.axes[0].lines[:8]
        looks = {(line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(looks) == 8
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    assert (pixels.max(-1) - pixels.min(-1)).max() <= 3


def luminance(colours):
    return np.asarray(colours)[..., :3] @ [0.299, 0.587, 0.114]


# Viénot, Brettel and Mollon (1999): what who lacks the long or the medium cones sees of a linear RGB colour.
LACKING = {
    "none": np.eye(3),
    "long": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "medium": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}


def seen(colour, lacking):
    linear = np.asarray(colour[:3]) ** 2.2
    return np.clip(LACKING[lacking] @ linear, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("lacking", LACKING)
def test_curves_are_told_apart_by_everybody(lacking):
    with drawing.in_style("colour"):
        figure = figure_with(drawing.CURVE_SIZE, lambda ax: drawing.draw_task_curves(ax, triangle(8)))
    lines = figure.axes[0].lines[:8]
    looks = [(seen(to_rgb(line.get_color()), lacking), line.get_marker(), line.get_linestyle()) for line in lines]
    for (one, *marks), (other, *others) in combinations(looks, 2):
        assert marks != others or np.abs(one - other).max() > 0.15
    assert all(luminance(to_rgb(line.get_color())) < 0.75 for line in lines)


@pytest.mark.parametrize("style", ["colour", "print", "dark_background", "ggplot"])
def test_numbers_can_be_read_in_every_cell_and_later_is_another_shade(style):
    values = np.linspace(0, 1, 100).reshape(10, 10)
    with drawing.in_style(style):
        figure = figure_with(drawing.matrix_size(10), lambda ax: drawing.draw_matrix(ax, values))
        check(figure)
    image = figure.axes[0].images[0]
    shades = luminance(image.to_rgba(image.get_array()))
    for text in figure.axes[0].texts:
        j, i = text.get_position()
        assert abs(luminance(to_rgb(text.get_color())) - shades[i, j]) >= 0.45
    steps = np.diff(shades.ravel())
    assert (steps > 0).all() or (steps < 0).all()  # as even in a grey print


@pytest.mark.parametrize("count", [7, 12, 30])
def test_many_runs_are_small_multiples(count):
    curves = {drawing.shortened(f"a run with a long name {k}") + ", 3 runs": triangle(5)[:, 0] for k in range(count)}
    assert len(curves) == count
    bars = {name: curve / 20 for name, curve in curves.items()}
    figure = Figure(figsize=drawing.multiples_size(count), layout="constrained")
    drawing.draw_multiples(figure, curves, "accuracy (%)", bars)
    assert set(curves) <= set(check(figure))


def test_an_unknown_style_is_refused(tmp_path):
    for style in ("colour", "print", "ggplot"):
        drawing.refuse_unknown_style(style, "style")
    with pytest.raises(ConfigurationError, match=r"style=ggplott: give colour, print, .* did you mean 'ggplot'"):
        drawing.refuse_unknown_style("ggplott", "style")
    own = tmp_path / "own.mplstyle"
    own.write_text("image.cmap: magma\n")
    drawing.refuse_unknown_style(str(own), "style")
    with drawing.in_style(str(own)):
        assert matplotlib.rcParams["image.cmap"] == "magma"
    assert matplotlib.rcParams["image.cmap"] != "magma"


def test_metrics_plot_themselves():
    scores = torch.eye(4)
    for metric in (AccuracyMatrix(2), Forgetting(2), ClassAccuracy(2, 4)):
        by_class = isinstance(metric, ClassAccuracy)
        for row in range(2):
            metric.update(scores, torch.tensor([0, 1, 2, row]), row, *([] if by_class else [0]))
        figure, ax = metric.plot()
        check(figure)
        again, same = metric.plot(metric.compute(), ax=pyplot.figure().subplots())
        assert again is same.figure is not ax.figure
    pyplot.close("all")
