"""Tables for the terminal, Markdown, LaTeX and CSV. Pure functions."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

__all__ = ["csv_text", "latex", "markdown", "plain"]

Rows = Sequence[Sequence[str]]


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


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return CSV; arguments as of ``plain``, but cells may be numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()


def _escaped(cell: str) -> str:
    for sign in "&%_#$":
        cell = cell.replace(sign, "\\" + sign)
    return cell.replace("±", r"$\pm$")
