"""``dcl-lightning report RUN ...`` prints the result of runs; with ``--html FILE`` it writes a page of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.paths import replacing
from dcl_lightning.report.page import PageRun, page_text, read_run
from dcl_lightning.report.text import result_text, table_text
from dcl_lightning.studies.runs import REPORT, Run, find_runs

__all__ = ["main"]


def main(args: Sequence[str]) -> int:
    """Show the runs of the arguments after ``report``, or write their page.

    Args:
        args: that follow ``report``.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: no finished run, or the file cannot be written.
    """
    parser = CommandParser("report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run, or of a study with several.")
    parser.add_argument("--html", metavar="FILE", help="Write a page of one run, or a comparison of several, to FILE.")
    given = parser.parse_args(args)
    runs = find_runs(given.runs)
    if given.html is None:
        print("\n\n".join(_text(run) for run in runs))
        return 0
    page = Path(given.html)
    named = zip(runs, _names([run.folder for run in runs]), strict=True)
    shown = [read_run(run.folder / REPORT.parent, run.facts, page, name, run.order) for run, name in named]
    text = page_text(shown)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with replacing(page) as draft:
            draft.write_text(text, encoding="utf-8", errors="replace")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--html={given.html} cannot be written ({error}): give the path of a file") from error
    print(f"Page: {page}")
    return 0


def _text(run: Run) -> str:
    """Return a run's accuracy matrix and its result as they were printed at its end."""
    facts, report = run.facts, run.folder / REPORT.parent
    matrix = PageRun("", facts).matrix
    values = [[math.nan if value is None else value for value in row] for row in matrix]
    rows = torch.tensor(values, dtype=torch.float64)
    table = table_text(rows, len(facts["matrix"]), facts.get("evaluated_on", "test")) + "\n" if matrix else ""
    return f"{table}Result: {result_text(facts)}\nReport: {report}"


def _names(folders: Sequence[Path]) -> list[str | None]:
    """Return the folders of several runs as seen from the one that has them all; None for a single run."""
    if len(folders) == 1:
        return [None]
    whole = [folder.resolve() for folder in folders]
    common = os.path.commonpath([folder.parent for folder in whole])
    names = [folder.relative_to(common) for folder in whole]
    above = {name.parent for name in names}
    if len({name.name for name in names}) == 1 and len(above) == len(names):  # all are version_0
        names = [name.parent for name in names]
    return [name.as_posix() for name in names]
