"""The page: one HTML file of one run or of several, which needs no network. A pure function of what it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
import yaml
from torch import Tensor

from dcl_lightning.functional import continual_metrics
from dcl_lightning.report.page import charts, colours, tables
from dcl_lightning.report.page.data import PageRun
from dcl_lightning.report.page.tables import Cell
from dcl_lightning.report.text import (
    COMPARED,
    SAMPLES,
    details_of,
    in_percent,
    metrics_of,
    run_name,
    tasks_of,
    title_text,
)

__all__ = ["page_text"]

_NAMED = 8  # tasks up to which each curve has a colour of its own
_MAX_CLASSES = 200  # of a heat map with a row for each class
_MAX_CONFUSED = 100  # classes of a confusion matrix: it grows with their square
# What says where a run lies, not how it learns.
_PLACES = ("trainer.logger", "trainer.default_root_dir")


def page_text(runs: Sequence[PageRun]) -> str:
    """Return the page of one run, or the comparison of several.

    Args:
        runs: at least one, with different names.
    """
    if len(runs) == 1:
        title, body = title_text(runs[0].facts), _one(runs[0])
    else:
        title, body = f"Comparison of {len(runs)} runs", _several(runs)
    style = _beside("page.css") + colours.css()
    script = _beside("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser fetches nothing, and runs no script but ours, whatever a name in the page contains.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n'
        f'<body>\n<main>\n{body}\n</main>\n<div id="tip" role="status" hidden></div>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


# -- one run -----------------------------------------------------------------------------------------


def _one(run: PageRun) -> str:
    facts = run.facts
    parts = [f"<header><h1>{escape(run_name(facts))}</h1><p>{escape(run.name)}{_knows(facts)}</p></header>"]
    parts.append(_headline(facts))
    if run.matrix:
        names, columns = _tasks(run.matrix), len(run.matrix)
        wide = columns > 10
        parts.append(_section("Accuracy of each task", [_matrix(run), _task_curves(run)], wide))
        of_top5, aware = _part(facts.get("top5"), "matrix"), _part(facts, "matrix_task_aware")
        for title, matrix in (("Top-5 accuracy", of_top5), ("Task-aware accuracy", aware)):
            if matrix:
                cells = [row[:columns] for row in matrix[:columns]]
                parts.append(_folded(title, _accuracy_map(cells, facts)))
        parts.append(_section("Over the tasks", [_progress(run)] + _classes(run, names)))
    parts.append(_section("The memory", _memory(run)))
    parts.append(_section("Where the time went", _time(facts)))
    head, metrics = metrics_of(facts)
    parts.append(_section("Metrics", [tables.plain(head, metrics, numbers=len(head) - 2)]))
    parts.append(_folded("Confusion matrix after the last task", _confusion(run)))
    parts.append(_folded("Tasks", _list_of_tasks(facts)))
    parts.append(_folded("Configuration", _pre(run.config)))
    parts.append(_section("Run and environment", [tables.plain([], _environment(facts))]))
    parts.append(_section("Files", [_links(run)]))
    parts.append(_section("To cite", [_references(facts)]))
    return "\n".join(filter(None, parts))


def _headline(facts: Mapping[str, object]) -> str:
    tiles = []
    for key, name in (("average_accuracy", "average accuracy"), ("forgetting", "forgetting")):
        tiles.append((name, _percent(facts.get(key)), " %"))
    seconds = facts.get("wall_time_s")
    if isinstance(seconds, Mapping):
        tiles.append(("wall time", _duration(sum(seconds.values())), ""))
    rows = facts.get("buffer_rows")
    if isinstance(rows, Mapping):
        tiles.append(("rows in memory", f"{rows.get('stored', 0):,}", ""))
    workers = facts.get("world_size")
    if isinstance(workers, int):
        tiles.append(("workers", str(workers), ""))
    shown = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}<small>{unit if text != '-' else ''}</small></dd></div>"
        for name, text, unit in tiles
    ]
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def _matrix(run: PageRun) -> str:
    return _accuracy_map(run.matrix, run.facts)


def _accuracy_map(cells: Sequence[Sequence[float | None]], facts: Mapping[str, object]) -> str:
    names = _tasks(cells)
    caption = f"% of the {_samples(facts)} of a task (column) after learning a task (row)"
    return tables.heat(_in_percent(cells), names, names, caption, "after task {row}, on task {column}: {value} %")


def _task_curves(run: PageRun) -> str:
    size, matrix = len(run.matrix), run.matrix
    few = size <= _NAMED
    shown = []
    for j in range(size):
        values = [None if i < j else matrix[i][j] for i in range(size)]
        name = f"task {j}"
        shown.append(charts.numbered(j, name, values) if few else charts.stepped(j, size, name, values))
    if size > 1:
        mean = _averages(matrix)
        shown.append(charts.Curve("mean", mean, "mean", None))
    return charts.curves(shown, "accuracy on the task (%)", few)


def _progress(run: PageRun) -> str:
    values = _tensor(run.matrix)
    found = {
        "average accuracy": continual_metrics.over_tasks(continual_metrics.average_accuracy, values).tolist(),
        "accuracy over all samples": (run.facts.get("pooled_accuracy_after_task") or [])[: len(values)],
        "forgetting": continual_metrics.over_tasks(continual_metrics.forgetting, values).tolist(),
    }
    curves = {name: [_known(value) for value in curve] for name, curve in found.items()}
    curves = {name: curve for name, curve in curves.items() if any(value is not None for value in curve)}
    # Dashes, since the first two are one where all tasks have as many samples.
    shown = [charts.numbered(n, name, curve)._replace(dashes=n) for n, (name, curve) in enumerate(curves.items())]
    return charts.curves(shown, "accuracy and forgetting (%)") if shown else ""


def _classes(run: PageRun, tasks: Sequence[str]) -> list[str]:
    if run.classes is None or len(run.classes.columns) > _MAX_CLASSES:
        return []
    cells = _in_percent([*zip(*run.classes.cells[: len(tasks)], strict=True)])
    caption = "% of each class (row) after learning a task (column)"
    says = "class {row} after task {column}: {value} %"
    return [tables.heat(cells, tasks, run.classes.columns, caption, says, decimals=0)]


def _memory(run: PageRun) -> list[str]:
    if not run.memory:
        return []
    size = max(line.task for line in run.memory) + 1
    by_origin: dict[int, dict[int, int]] = {}
    by_class: dict[str, list[int]] = {}
    for line in run.memory:
        stack = by_origin.setdefault(line.task, {})
        stack[line.origin] = stack.get(line.origin, 0) + line.rows
        by_class.setdefault(line.label, [0] * size)[line.task] += line.rows
    capacity = (run.facts.get("buffer_rows") or {}).get("nominal")
    says = "after task {task}: {amount} rows of task {origin}, of {all}"
    parts = [charts.bars(by_origin, size, capacity, ("rows stored", "capacity", "of task"), says)]
    if len(by_class) <= _MAX_CLASSES:
        names = [name for name in (run.classes.columns if run.classes else by_class) if name in by_class]
        cells = [[float(rows) or None for rows in by_class[name]] for name in names]
        most = max(max(rows) for rows in by_class.values())
        caption = "rows stored of each class (row) after learning a task (column)"
        says = "class {row} after task {column}: {value} rows"
        tasks = [str(task) for task in range(size)]
        parts.append(tables.heat(cells, tasks, names, caption, says, most=max(most, 1), decimals=0))
    return parts


def _time(facts: Mapping[str, object]) -> list[str]:
    phases = facts.get("wall_time_s")
    if not isinstance(phases, Mapping):
        return []
    whole = sum(phases.values()) or 1.0
    lines = [
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td class="n">{seconds:.1f} s</td>'
        f'<td class="n">{100 * seconds / whole:.1f} %</td>'
        f'<td class="wide"><i class="share" style="width:{100 * seconds / whole:.1f}%"></i></td></tr>'
        for name, seconds in phases.items()
    ]
    return [f'<div class="scroll"><table class="plain">{"".join(lines)}</table></div>']


def _confusion(run: PageRun) -> str:
    found = run.confusion
    if found is None or len(found.columns) > _MAX_CONFUSED:
        return ""
    totals = [sum(value or 0 for value in row) for row in found.cells]
    cells = [
        [100 * (value or 0) / total if total else None for value in row]
        for row, total in zip(found.cells, totals, strict=True)
    ]
    caption = "% of the samples of a class (row) that are predicted as a class (column)"
    says = "class {row} predicted as {column}: {value} %"
    return tables.heat(cells, found.columns, found.rows, caption, says, decimals=0)


def _list_of_tasks(facts: Mapping[str, object]) -> str:
    head, rows = tasks_of(dict(facts))
    return tables.plain(head, rows, numbers=3) if rows else ""


def _environment(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    peaks = (("peak_host_bytes", "peak of the host's memory"), ("peak_device_bytes", "peak of the device's memory"))
    more = [(name, f"{value / 2**20:,.0f} MiB") for key, name in peaks if isinstance(value := facts.get(key), int)]
    return [*details_of(dict(facts)), *more]


def _references(facts: Mapping[str, object]) -> str:
    found = facts.get("references")
    if not isinstance(found, list) or not found:
        return ""
    items = "".join(f"<li>{escape(str(reference))}</li>" for reference in found)
    return f"<ul>{items}</ul><p><code>{escape(str(facts.get('cite')))}</code> prints BibTeX.</p>"


# -- several runs ------------------------------------------------------------------------------------


def _several(runs: Sequence[PageRun]) -> str:
    parts = [f"<header><h1>Comparison of {len(runs)} runs</h1>"]
    parts.append("<p>In %, of test samples unless a run says otherwise. A click on a column's head sorts.</p></header>")
    parts.append(_section("", [_comparison(runs)]))
    shown = [charts.numbered(n, run.name, _averages(run.matrix)) for n, run in enumerate(runs) if run.matrix]
    if shown:
        parts.append(_section("Average accuracy over the tasks", [charts.curves(shown, "average accuracy (%)")]))
    parts.append(_section("Accuracy of each task", [_small(n, run) for n, run in enumerate(runs)]))
    parts.append(_section("What differs in the configurations", [_differences(runs)]))
    return "\n".join(filter(None, parts))


def _comparison(runs: Sequence[PageRun]) -> str:
    columns: dict[str, list[Cell]] = {"run": [Cell(run.name, run.name, f"#run-{n}") for n, run in enumerate(runs)]}
    for name, key in (("agent", "agent"), ("data", "dataset"), ("seed", "seed")):
        columns[name] = [_cell(run.facts.get(key)) for run in runs]
    columns["order"] = [_cell(run.order) for run in runs]
    for key, name in COMPARED.items():
        columns[name] = [Cell(_percent(run.facts.get(key)), _known(run.facts.get(key))) for run in runs]
    seconds = [run.facts.get("wall_time_s") for run in runs]
    sums = [sum(phases.values()) if isinstance(phases, Mapping) else None for phases in seconds]
    columns["wall time"] = [Cell("-" if value is None else _duration(value), value) for value in sums]
    stored = [(run.facts.get("buffer_rows") or {}).get("stored") for run in runs]
    columns["rows in memory"] = [_cell(value) for value in stored]
    columns["workers"] = [_cell(run.facts.get("world_size")) for run in runs]
    kept = {name: cells for name, cells in columns.items() if any(cell.value is not None for cell in cells)}
    return tables.sortable([*kept], [*zip(*kept.values(), strict=True)])


def _small(number: int, run: PageRun) -> str:
    lines = [f'<article id="run-{number}"><h3>{escape(run.name)}</h3>']
    lines.append(f"<p>{escape(title_text(run.facts))}{_knows(run.facts)}</p>")
    lines.append(_matrix(run) if run.matrix else "")
    lines.append(_folded("Configuration", _pre(run.config)))
    lines.append(_folded("Files", _links(run)))
    return "".join(lines) + "</article>"


def _differences(runs: Sequence[PageRun]) -> str:
    """Return the keys of the configurations whose values are not the same in all."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = []
    for key in keys:
        values = [config.get(key, "-") for config in flat]
        if len(set(values)) > 1 and not key.startswith(_PLACES):
            rows.append([key, *values])
    return tables.plain(["key", *(run.name for run in runs)], rows) if rows else ""


def _flat(config: str) -> dict[str, str]:
    try:
        found = yaml.safe_load(config)
    except (yaml.YAMLError, RecursionError):
        return {}
    flat: dict[str, str] = {}

    def add(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                # As a flag of the command line names it.
                add(prefix if key == "init_args" else f"{prefix}.{key}".lstrip("."), part)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)

    add("", found if isinstance(found, dict) else {})
    return flat


# -- parts -------------------------------------------------------------------------------------------


def _section(title: str, parts: Sequence[str], wide: bool = False) -> str:
    shown = "".join(filter(None, parts))
    if not shown:
        return ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section>{head}<div class="parts{" one" if wide or len(parts) == 1 else ""}">{shown}</div></section>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _pre(text: str) -> str:
    return f'<pre tabindex="0">{escape(text)}</pre>' if text.strip() else ""


def _links(run: PageRun) -> str:
    items = [f'<li><a href="{escape(address)}">{escape(name)}</a></li>' for name, address in run.links.items()]
    return f'<ul class="files">{"".join(items)}</ul>' if items else ""


def _knows(facts: Mapping[str, object]) -> str:
    return " · the network knows the task of each sample" if facts.get("tasks_known") else ""


def _samples(facts: Mapping[str, object]) -> str:
    return SAMPLES.get(str(facts.get("evaluated_on", "test")), "samples")


def _tasks(matrix: Sequence[object]) -> list[str]:
    return [str(task) for task in range(len(matrix))]


def _part(facts: object, key: str) -> list[list[float | None]]:
    return (facts.get(key) or []) if isinstance(facts, Mapping) else []


def _tensor(matrix: Sequence[Sequence[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in matrix], dtype=torch.float64)


def _averages(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    found = continual_metrics.over_tasks(continual_metrics.average_accuracy, _tensor(matrix))
    return [_known(value) for value in found.tolist()]


def _in_percent(cells: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[None if value is None else 100 * value for value in row] for row in cells]


def _known(value: object) -> float | None:
    return float(value) if isinstance(value, float | int) and not math.isnan(value) else None


def _percent(value: object) -> str:
    known = _known(value)
    return in_percent(math.nan if known is None else known)


def _cell(value: object) -> Cell:
    if value is None:
        return Cell("-", None)
    return Cell(f"{value:,}", value) if isinstance(value, int) else Cell(str(value), str(value))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
