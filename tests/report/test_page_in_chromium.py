"""The page in Debian's Chromium: nothing in its console, keyboard, sorting, hover, and a narrow screen.

With ``PAGE_SHOTS=FOLDER`` the screenshots stay there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from dcl_lightning import cli
from tests.report.test_page import HOSTILE, written

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
# What a reader does, and what the page then is; written into the page, whose policy the tests' copy lacks.
ACTIONS = """
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const tip = () => document.getElementById("tip").hidden ? null : document.getElementById("tip").textContent;
const grids = [...document.querySelectorAll("[data-grid]")];
const found = {stops: grids.map((grid) => grid.querySelectorAll("[tabindex='0']").length)};
const root = document.documentElement;
found.width = [innerWidth, root.scrollWidth];
const cell = document.querySelector(".heat [tabindex='0']");
cell.focus(); found.first = tip();
press("ArrowDown"); press("ArrowRight"); found.moved = tip();
press("End"); press("ArrowRight"); found.end = tip();
press("Escape"); found.escaped = tip();
const mark = document.querySelector(".chart [tabindex='0']");
mark.focus(); press("ArrowRight"); found.mark = tip(); press("ArrowDown"); found.below = tip();
document.activeElement.blur(); found.left = tip();
document.querySelectorAll(".heat td:not(:empty)")[1].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
found.hovered = tip();
const button = document.querySelector(".legend button"), curve = document.querySelector(".chart .row");
button.click(); found.hidden = getComputedStyle(curve).display;
button.click(); found.shown = getComputedStyle(curve).display;
const table = document.querySelector(".sortable");
if (table) {
  const head = [...table.tHead.rows[0].cells].find((th) => th.textContent === "average accuracy");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[head.cellIndex].textContent);
  head.querySelector("button").click(); found.down = [head.getAttribute("aria-sort"), column()];
  head.querySelector("button").click(); found.up = [head.getAttribute("aria-sort"), column()];
}
const result = top.document.createElement("output");
result.id = "found"; result.textContent = JSON.stringify(found);
top.document.body.append(result);
"""


def chromium(tmp_path: Path, page: Path, *flags: str, width: int = 1280, height: int = 1400) -> str:
    """Return what Chromium prints of a page; nothing of it may come from the page's console."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}", "--enable-logging=stderr", *flags,
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


def page_of(tmp_path: Path, count: int) -> Path:
    for n in range(count):
        written(tmp_path / f"runs/agent_{n}/version_0", n, f"agent_{n}")
    page = tmp_path / f"{count}.html"
    assert cli.main(["report", str(tmp_path / "runs"), "--html", str(page)]) == 0
    return page


def acted(tmp_path: Path, page: Path, width: int) -> dict:
    """Return what the actions find on a screen of a width: in a frame, because a window has at least 500 points."""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    text = text.replace("</body>", f"<script>{ACTIONS}</script></body>")
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe width="{width}" height="900" style="border:0" '
        f'srcdoc="{escape(text)}"></iframe>',
        encoding="utf-8",
    )
    text = chromium(tmp_path, frame, "--dump-dom")
    return json.loads(unescape(re.search(r'<output id="found">(.*?)</output>', text)[1]))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("width", [1200, 360])
def test_keyboard_hover_and_sorting(tmp_path: Path, count: int, width: int) -> None:
    page = page_of(tmp_path, count)
    facts = [json.loads(f.read_text()) for f in sorted(tmp_path.glob("runs/*/*/report/accuracy_matrix.json"))]
    matrix = facts[0]["matrix"]
    found = acted(tmp_path, page, width)
    assert set(found["stops"]) == {1}
    assert found["width"] == [width, width], "nothing is wider than the screen"
    assert found["first"] == found["escaped"] or found["escaped"] is None
    assert found["first"] == f"after task 0, on task 0: {100 * matrix[0][0]:.1f} %"
    assert found["moved"] == found["end"] == f"after task 1, on task 1: {100 * matrix[1][1]:.1f} %"
    assert found["escaped"] is None
    assert found["left"] is None
    assert found["hovered"] == f"after task 1, on task 0: {100 * matrix[1][0]:.1f} %"
    assert (found["hidden"], found["shown"]) == ("none", "inline")
    if count == 1:
        assert found["mark"] == f"task 0 after task 1: {100 * matrix[1][0]:.1f} %"
        assert found["below"] == f"task 1 after task 1: {100 * matrix[1][1]:.1f} %"
    else:
        values = sorted(content["average_accuracy"] for content in facts)
        texts = [f"{100 * value:.1f}" for value in values]
        assert found["down"] == ["descending", texts[::-1]]
        assert found["up"] == ["ascending", texts]


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "<img src=x onerror=alert(1)>"
    written(place, 0, HOSTILE, [f"{HOSTILE}{y}" for y in range(8)], dataset=HOSTILE)
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "runs"), "--html", str(page)]) == 0
    text = chromium(tmp_path, page, "--dump-dom")
    assert text.count("<script>") == 1
    assert "<img" not in re.sub(r'"[^"]*"', "", text)


@pytest.mark.parametrize(
    ("name", "count", "width", "height"), [("one", 1, 1280, 2600), ("four", 4, 1280, 2200), ("narrow", 1, 360, 4200)]
)
def test_screenshots(tmp_path: Path, name: str, count: int, width: int, height: int) -> None:
    shot = Path(os.environ.get("PAGE_SHOTS", tmp_path)) / f"{name}.png"
    chromium(tmp_path, page_of(tmp_path, count), f"--screenshot={shot}", width=width, height=height)
    assert shot.read_bytes().startswith(b"\x89PNG")
