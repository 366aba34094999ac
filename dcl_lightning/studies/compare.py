"""``dcl-lightning compare RUN RUN ...``: configurations side by side, each over its seeds and class orders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.functional.continual_metrics import FORMULAS
from dcl_lightning.metrics import drawing
from dcl_lightning.metrics.drawing import refuse_unknown_style
from dcl_lightning.paths import replacing
from dcl_lightning.report.text import COMPARED, SAMPLES, csv_text, in_percent
from dcl_lightning.studies.runs import Run, find_runs, grouped, one_each

__all__ = ["Estimate", "between", "estimate", "latex", "main", "markdown", "paired", "plain", "write_comparison"]

K = TypeVar("K")
Rows = Sequence[Sequence[str]]

_ON_ONE_PAIR_OF_AXES = 6  # curves: beyond, each has axes of its own


def main(args: Sequence[str]) -> int:
    """Compare the runs of the arguments after ``compare``; return the exit code."""
    parser = CommandParser("compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or of a study with several.")
    parser.add_argument("--out", help="Folder to write comparison.csv, .md, .tex and .png to; none by default.")
    parser.add_argument("--style", default="colour", help="Of the picture: colour, print, or a style of matplotlib.")
    given = parser.parse_args(args)
    refuse_unknown_style(given.style, "compare: --style")
    runs, notes = one_each(find_runs(given.runs))
    groups = grouped(runs)
    print("\n".join([text_of(groups), *notes]))
    if given.out:
        write_comparison(groups, Path(given.out), given.style)
        print(f"Comparison: {given.out}")
    return 0


def text_of(groups: dict[str, list[Run]]) -> str:
    """Return the tables for the terminal.

    Args:
        groups: runs by configuration.
    """
    parts = ["In %: mean ± standard deviation over runs", plain(*_table(groups))]
    differences = _differences(groups)
    if differences[1]:
        parts += ["", f"Average accuracy less that of {next(iter(groups))}, in points, over the same seeds and orders"]
        parts.append(plain(*differences))
    return "\n".join([*parts, *_cautions(groups)])


def write_comparison(groups: dict[str, list[Run]], folder: Path, style: str = "colour") -> None:
    """Write ``comparison.csv``, ``.md``, ``.tex`` and, with matplotlib, ``.png``.

    Args:
        groups: runs by configuration.
        folder: is created if it does not exist.
        style: of the picture, see ``drawing.in_style``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head, rows = _table(groups)
    differences = _differences(groups)
    text = "# Comparison\n\nIn %: mean ± standard deviation over runs.\n\n" + markdown(head, rows)
    text += "\n" + "\n".join(f"{name}: {FORMULAS[key]}." for key, name in COMPARED.items() if key in FORMULAS) + "\n"
    if differences[1]:
        text += f"\nAverage accuracy less that of {next(iter(groups))}, in points, over the same seeds and orders:\n\n"
        text += markdown(*differences)
    text += "".join(f"\n{line}.\n" for line in _cautions(groups))
    contents = {"csv": _numbers(groups), "md": text, "tex": latex(head, rows)}
    if find_spec("matplotlib") is not None:
        contents["md"] += "\n![accuracy over tasks](comparison.png)\n"
        with replacing(folder / "comparison.png") as draft:
            draft.write_bytes(_figure(groups, style))
    for ending, content in contents.items():
        with replacing(folder / f"comparison.{ending}") as draft:
            draft.write_text(content, encoding="utf-8")


def _cautions(groups: dict[str, list[Run]]) -> list[str]:
    """Return lines that say which figures are not of the same samples, or not of the test set."""
    lines, sets = [], dict[str, list[str]]()
    for name, runs in groups.items():
        sets.setdefault(str(runs[0].facts.get("dataset")), []).append(name)
    if len(sets) > 1:
        lines.append("Of several data sets: " + "; ".join(f"{', '.join(of)} of {name}" for name, of in sets.items()))
    names = [name for name, runs in groups.items() if any(run.facts.get("evaluated_on") == "held_out" for run in runs)]
    if names:
        lines.append(f"Of {SAMPLES['held_out']}, not of the test set: {', '.join(names)}")
    return lines


def _table(groups: dict[str, list[Run]]) -> tuple[list[str], list[list[str]]]:
    head = ["configuration", "runs", *COMPARED.values(), "95 % interval", "over seeds", "over orders"]
    rows = []
    for name, runs in groups.items():
        cells = [_cell(_values(runs, key)) for key in COMPARED]
        values = _values(runs, "average_accuracy")
        whole = estimate(values) if values else None
        seeds, orders = between({run.replicate[::-1]: _value(run, "average_accuracy") for run in runs})
        spread = [in_percent(deviation) for deviation in (seeds, orders)]
        rows.append([name, str(len(runs)), *cells, _interval(whole), *spread])
    return head, rows


def _differences(groups: dict[str, list[Run]]) -> tuple[list[str], list[list[str]]]:
    first, *others = groups
    key = "average_accuracy"
    theirs = {run.replicate: _value(run, key) for run in groups[first]}
    rows = []
    for name in others:
        found = paired({run.replicate: _value(run, key) for run in groups[name]}, theirs)
        if found is not None:
            rows.append([name, str(found.n), f"{100 * found.mean:+.1f}", in_percent(found.deviation), _interval(found)])
    return ["configuration", "pairs", "difference", "deviation", "95 % interval"], rows


def _numbers(groups: dict[str, list[Run]]) -> str:
    """Return one line for each run: configuration, folder, seed, order, and its metrics as fractions."""
    names = [key for key in FORMULAS if any(run.facts.get(key) is not None for runs in groups.values() for run in runs)]
    rows = [
        [name, run.folder, run.seed, run.order, *(run.facts.get(key) for key in names)]
        for name, runs in groups.items()
        for run in runs
    ]
    return csv_text(["configuration", "folder", "seed", "order", *names], rows)


def _figure(groups: dict[str, list[Run]], style: str) -> bytes:
    """Return the accuracy over all samples seen after each task as a PNG: means, and bars of one deviation."""
    from matplotlib.figure import Figure

    from dcl_lightning.report.figures import file_of

    curves, deviations = {}, {}
    for name, runs in groups.items():
        rows = [run.facts["pooled_accuracy_after_task"] for run in runs]
        rows = [row for row in rows if len(row) == len(rows[0])]
        values = np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=np.float64)
        label = drawing.shortened(name) + f", {len(rows)} runs"
        curves[label] = values.mean(0)
        if len(rows) > 1:
            deviations[label] = values.std(0, ddof=1)
    several = len(curves) > _ON_ONE_PAIR_OF_AXES
    size = drawing.multiples_size(len(curves)) if several else drawing.CURVE_SIZE
    with drawing.in_style(style):
        figure = Figure(figsize=size, layout="constrained")
        what = "accuracy over all samples seen (%)"
        if several:
            drawing.draw_multiples(figure, curves, what, deviations)
        else:
            drawing.draw_curves(figure.subplots(), curves, what, deviations)
        return file_of(figure)


def _value(run: Run, key: str) -> float:
    value = run.facts.get(key)
    return math.nan if value is None else float(value)


def _values(runs: Sequence[Run], key: str) -> list[float]:
    return [value for run in runs if not math.isnan(value := _value(run, key))]


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    found = estimate(values)
    return in_percent(found.mean) + ("" if math.isnan(found.deviation) else f" ± {in_percent(found.deviation)}")


def _interval(found: Estimate | None) -> str:
    return "-" if found is None or math.isnan(found.low) else f"{in_percent(found.low)} to {in_percent(found.high)}"


# -- statistics over runs ----------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over n values.

    Args:
        mean: of the values.
        deviation: their standard deviation, with n - 1; NaN for one value.
        low: lower end of the 95 % interval of the mean by Student's t distribution; NaN for one value.
        high: upper end.
        n: number of values.
    """

    mean: float
    deviation: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, deviation and 95 % interval.

    >>> [round(x, 3) for x in estimate([1.0, 2.0, 3.0])]
    [2.0, 1.0, -0.484, 4.484, 3]

    Args:
        values: at least one.
    """
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    from scipy.stats import t

    deviation = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Estimate(mean, deviation, mean - half, mean + half, n)


def paired(ours: Mapping[K, float], theirs: Mapping[K, float]) -> Estimate | None:
    """Return the estimate of ``ours - theirs`` over the keys that both have; None with fewer than two.

    Args:
        ours: a value for each pair of seed and order.
        theirs: likewise.
    """
    both = [key for key in ours if key in theirs]
    return estimate([ours[key] - theirs[key] for key in both]) if len(both) > 1 else None


def between(values: Mapping[tuple[object, object], float]) -> tuple[float, float]:
    """Return the deviation over seeds and that over orders, each NaN for a single one.

    The first is the root of the mean variance within an order, the second the deviation of the orders' means.

    Args:
        values: by order and seed.
    """
    orders: dict[object, list[float]] = {}
    for (order, _), value in values.items():
        orders.setdefault(order, []).append(value)
    within = [float(np.var(group, ddof=1)) for group in orders.values() if len(group) > 1]
    means = [float(np.mean(group)) for group in orders.values()]
    over_orders = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    return (math.sqrt(float(np.mean(within))) if within else math.nan), over_orders


# -- tables ------------------------------------------------------------------------------------------


def plain(head: Sequence[str], rows: Rows) -> str:
    """Return a table in columns, the first to the left and the others to the right.

    Args:
        head: of the columns.
        rows: as many cells each.
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def markdown(head: Sequence[str], rows: Rows) -> str:
    """Return a table in Markdown; arguments as of ``plain``."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex(head: Sequence[str], rows: Rows) -> str:
    """Return a ``tabular`` for the package booktabs; arguments as of ``plain``."""
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (head, *rows)]
    body = [lines[0], r"\midrule", *lines[1:]]
    start = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([start, r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(cell: str) -> str:
    for sign in "&%_#$":
        cell = cell.replace(sign, "\\" + sign)
    return cell.replace("±", r"$\pm$")
