"""Tables as HTML: heat maps whose cells are coloured, and plain ones. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from dcl_lightning.report.page.colours import SHADES

__all__ = ["Cell", "heat", "plain", "sortable"]

_NUMBERED = 20  # columns of a heat map up to which numbers fit into its cells
_ALL_ROWS = 30  # rows of a heat map up to which it is as high as it has to be


def heat(
    cells: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    caption: str,
    says: str,
    most: float = 100.0,
    decimals: int = 1,
) -> str:
    """Return a heat map; what a cell says is shown on hover and by keyboard.

    Args:
        cells: numbers, None where there is none.
        columns: names.
        rows: names.
        caption: above the map.
        says: ``{row}``, ``{column}`` and ``{value}`` stand for a cell's names and number.
        most: number with the last colour; 0 has the first.
        decimals: of the numbers.
    """  # fmt: skip
    dense = len(columns) > _NUMBERED
    step = next(s for s in (1, 5, 10, 20, 50, 100, len(columns)) if len(columns) <= 20 * s)
    short = max(map(len, (*columns, *rows)), default=0) <= 4

    def named(i: int) -> str:
        return ' class="k"' if dense and short and i % step == 0 else ""

    kind = "dense" if dense else "many" if len(columns) > _NUMBERED // 2 else "few"
    head = "".join(f'<th scope="col"{named(j)}>{escape(name)}</th>' for j, name in enumerate(columns))
    lines, first = [], ' tabindex="0"'
    for i, (name, row) in enumerate(zip(rows, cells, strict=True)):
        line = [f'<th scope="row"{named(i)}>{escape(name)}</th>']
        for value in row:
            if value is None:
                line.append("<td></td>")
                continue
            shade = round(min(max(value / most, 0.0), 1.0) * SHADES)
            line.append(f"<td class=c{shade}{first}>{value:.{decimals}f}</td>")
            first = ""
        lines.append(f"<tr>{''.join(line)}</tr>")
    tall = " tall" if len(rows) > _ALL_ROWS and not dense else ""
    scale = f'<div class="legend"><span class="key">0<i class="bar map"></i>{most:.0f}</span></div>'
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll{tall}">'
        f'<table class="heat {kind}" role="grid" aria-label="{escape(caption)}" data-grid data-says="{escape(says)}">'
        f"<thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{scale}</figure>"
    )


def plain(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Return a table of texts, the first column as heads of its rows.

    Args:
        head: names of the columns; empty for none.
        rows: as many cells each.
        numbers: how many of the last columns are set to the right.
    """
    lines = []
    for first, *others in rows:
        cells = [
            f'<td class="n">{escape(cell)}</td>' if len(others) - j <= numbers else f"<td>{escape(cell)}</td>"
            for j, cell in enumerate(others)
        ]
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>')
    top = "".join(
        f'<th scope="col"{" class=n" if len(head) - j <= numbers else ""}>{escape(name)}</th>'
        for j, name in enumerate(head)
    )
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="plain">{top}<tbody>{"".join(lines)}</tbody></table></div>'


class Cell(NamedTuple):
    """A cell of a table that can be sorted.

    Args:
        text: what it shows.
        value: by which it is sorted: a number, or a text; None for a cell without a value, which stays last.
        link: an address that the text leads to.
    """

    text: str
    value: float | str | None
    link: str = ""


def sortable(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table that is sorted by the buttons in its head.

    Args:
        head: names of the columns.
        rows: as many cells each.
    """
    numbers = [any(isinstance(row[j].value, float | int) for row in rows) for j in range(len(head))]
    top = "".join(
        f'<th scope="col"{" class=n" if number else ""} aria-sort="none"><button type="button">'
        f'{escape(name)}<span aria-hidden="true"></span></button></th>'
        for name, number in zip(head, numbers, strict=True)
    )
    lines = [f"<tr>{''.join(_sorted_by(cell, j) for j, cell in enumerate(row))}</tr>" for row in rows]
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="plain sortable">{body}</table></div>'


def _sorted_by(cell: Cell, column: int) -> str:
    number = isinstance(cell.value, float | int)
    value = "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'
    text = f'<a href="{escape(cell.link)}">{escape(cell.text)}</a>' if cell.link else escape(cell.text)
    if column == 0:
        return f'<th scope="row"{value}>{text}</th>'
    return f"<td{' class=n' if number else ''}{value}>{text}</td>"
