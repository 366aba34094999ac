"""``dcl-lightning compare RUN RUN ...``: configurations side by side, each over its seeds and class orders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.functional.continual_metrics import FORMULAS
from dcl_lightning.paths import replacing
from dcl_lightning.studies import tables
from dcl_lightning.studies.runs import Run, find_runs, grouped, one_each
from dcl_lightning.studies.statistics import Estimate, between, estimate, paired

__all__ = ["main", "write_comparison"]

# The rest is in the CSV file.
_SHOWN = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "incremental",
    "pooled_accuracy": "over all samples",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
}


def main(args: Sequence[str]) -> int:
    """Compare the runs that the arguments name."""
    parser = CommandParser("compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or of a study with several.")
    parser.add_argument("--out", help="Folder to write comparison.csv, .md, .tex and .png to; none by default.")
    given = parser.parse_args(args)
    runs, notes = one_each(find_runs(given.runs))
    groups = grouped(runs)
    print("\n".join([text_of(groups), *notes]))
    if given.out:
        write_comparison(groups, Path(given.out))
        print(f"Comparison: {given.out}")
    return 0


def text_of(groups: dict[str, list[Run]]) -> str:
    """Return the tables for the terminal.

    Args:
        groups: runs by configuration.
    """
    parts = ["In %: mean ± standard deviation over runs", tables.plain(*_table(groups))]
    differences = _differences(groups)
    if differences[1]:
        parts += ["", f"Average accuracy less that of {next(iter(groups))}, in points, over the same seeds and orders"]
        parts.append(tables.plain(*differences))
    return "\n".join(parts)


def write_comparison(groups: dict[str, list[Run]], folder: Path) -> None:
    """Write ``comparison.csv``, ``.md``, ``.tex`` and, with matplotlib, ``.png``.

    Args:
        groups: runs by configuration.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head, rows = _table(groups)
    differences = _differences(groups)
    text = "# Comparison\n\nIn %: mean ± standard deviation over runs.\n\n" + tables.markdown(head, rows)
    text += "\n" + "\n".join(f"{name}: {FORMULAS[key]}." for key, name in _SHOWN.items() if key in FORMULAS) + "\n"
    if differences[1]:
        text += f"\nAverage accuracy less that of {next(iter(groups))}, in points, over the same seeds and orders:\n\n"
        text += tables.markdown(*differences)
    contents = {"csv": _numbers(groups), "md": text, "tex": tables.latex(head, rows)}
    if find_spec("matplotlib") is not None:
        contents["md"] += "\n![accuracy over tasks](comparison.png)\n"
        with replacing(folder / "comparison.png") as draft:
            draft.write_bytes(_picture(groups))
    for ending, content in contents.items():
        with replacing(folder / f"comparison.{ending}") as draft:
            draft.write_text(content, encoding="utf-8")


def _table(groups: dict[str, list[Run]]) -> tuple[list[str], list[list[str]]]:
    head = ["configuration", "runs", *_SHOWN.values(), "95 % interval", "over seeds", "over orders"]
    rows = []
    for name, runs in groups.items():
        cells = [_cell(_values(runs, key)) for key in _SHOWN]
        values = _values(runs, "average_accuracy")
        whole = estimate(values) if values else None
        seeds, orders = between({run.replicate[::-1]: _value(run, "average_accuracy") for run in runs})
        spread = [_number(deviation) for deviation in (seeds, orders)]
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
            rows.append([name, str(found.n), f"{100 * found.mean:+.1f}", _number(found.deviation), _interval(found)])
    return ["configuration", "pairs", "difference", "deviation", "95 % interval"], rows


def _numbers(groups: dict[str, list[Run]]) -> str:
    """Return one line a run, fractions, with what tells it from the others."""
    names = [key for key in FORMULAS if any(run.facts.get(key) is not None for runs in groups.values() for run in runs)]
    rows: list[list[object]] = []
    for name, runs in groups.items():
        for run in runs:
            figures = ["" if run.facts.get(key) is None else run.facts[key] for key in names]
            rows.append([name, run.folder, "" if run.seed is None else run.seed, run.order or "", *figures])
    return tables.csv_text(["configuration", "folder", "seed", "order", *names], rows)


def _picture(groups: dict[str, list[Run]]) -> bytes:
    """Draw the accuracy over all samples seen, after each task: means, and bars of one deviation."""
    from matplotlib.figure import Figure

    from dcl_lightning.metrics import drawing
    from dcl_lightning.report.figures import png

    figure = Figure(figsize=drawing.CURVE_SIZE, layout="constrained")
    ax = figure.subplots()
    curves = {}
    for name, runs in groups.items():
        rows = [run.facts["pooled_accuracy_after_task"] for run in runs]
        rows = [row for row in rows if len(row) == len(rows[0])]
        values = np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=np.float64)
        curves[drawing.shortened(name) + f", {len(rows)} runs"] = values.mean(0)
        if len(rows) > 1:
            bars = 100 * values.std(0, ddof=1)
            ax.errorbar(range(len(bars)), 100 * values.mean(0), bars, fmt="none", ecolor="0.5", capsize=2, lw=0.8)
    drawing.draw_curves(ax, curves, "accuracy over all samples seen (%)")
    return png(figure)


def _value(run: Run, key: str) -> float:
    value = run.facts.get(key)
    return math.nan if value is None else float(value)


def _values(runs: Sequence[Run], key: str) -> list[float]:
    return [value for run in runs if not math.isnan(value := _value(run, key))]


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    found = estimate(values)
    return f"{100 * found.mean:.1f}" + ("" if math.isnan(found.deviation) else f" ± {100 * found.deviation:.1f}")


def _interval(found: Estimate | None) -> str:
    return "-" if found is None or math.isnan(found.low) else f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _number(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f}"
