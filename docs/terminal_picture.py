"""``python docs/terminal_picture.py FILE < OUTPUT`` draws the last lines of what a terminal shows."""

from __future__ import annotations

import html
import sys

LINES, COLUMNS = 16, 100
WIDTH, HEIGHT, TOP = 8.5, 18, 34


def picture(lines: list[str]) -> str:
    """Return lines of text as a terminal's window, in fonts that every system has."""
    text = [
        f'<text x="16" y="{TOP + HEIGHT * (row + 1)}" xml:space="preserve">{html.escape(line[:COLUMNS])}</text>'
        for row, line in enumerate(lines)
    ]
    width, height = round(WIDTH * max(map(len, lines)) + 40), TOP + HEIGHT * len(lines) + 24
    dots = "".join(
        f'<circle cx="{20 + 20 * place}" cy="18" r="6" fill="{colour}"/>'
        for place, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
        f'<rect width="100%" height="100%" rx="8" fill="#1e1e2e"/>{dots}'
        '<g font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="14" fill="#e6e6ef">'
        + "".join(text)
        + "</g></svg>\n"
    )


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(picture([line.rstrip() for line in sys.stdin.read().splitlines()][-LINES:]))
