"""What the tutorials show is what a reader sees, and the figures of the guide to a method are results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcl_lightning import cli
from tests.documents import ROOT, blocks, commands

DOCS = ROOT / "docs"


def test_a_first_fit_prints_and_writes_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "tutorials" / "first_fit.md"
    tables = [block.text.splitlines() for block in blocks(page) if block.language == "text"]
    typed = [list(command.words[1:]) for command in commands(page) if "--trainer.logger.name" in command.words]
    for words, table in zip(typed, tables, strict=True):
        assert cli.main(words) == 0
        printed = capsys.readouterr().out.splitlines()
        start = len(printed) - printed[::-1].index(table[0]) - 1
        for shown, found in zip(table, printed[start : start + len(table)], strict=True):
            assert shape_of(shown) == shape_of(found)
        # The last bits of a sum differ from machine to machine, and so do networks: only averages are alike.
        last = [accuracies_of(lines[-1])[-1] for lines in (table, printed[start : start + len(table)])]
        assert last[0] == pytest.approx(last[1], abs=12)
    folder = tmp_path / "runs/er_digits/version_0"
    named = re.findall(r"^\| `(\S+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert named
    assert [name for name in named if not (folder / name).is_file()] == []


def shape_of(line: str) -> str:
    """Return a line with a word for each accuracy."""
    return " ".join(re.sub(r"\d+\.\d", "accuracy", line).split())


def accuracies_of(line: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"\d+\.\d", line)]


def finals() -> dict[tuple[str, str, str], str]:
    """Return the final accuracies of RESULTS.md by heading, case and size of the memory."""
    found, heading = {}, ""
    for line in (ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines():
        heading = line[3:].lower() if line.startswith("## ") else heading
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 5 and "±" in line:
            case = re.findall(r"`([^`]+)`", cells[1])
            # In the table of published numbers the second column is the source, and the fourth ours.
            size, value = ("", cells[4]) if heading == "published numbers" else (cells[2], cells[3])
            found.setdefault((heading, case[-1] if case else "", size), value)
    return found


def test_the_figures_of_the_guide_to_a_method_are_results() -> None:
    results, header, rows = finals(), [""], 0
    for line in (DOCS / "which_method.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if line.startswith("|") and not line.startswith("|--") and "±" not in line:
            header = cells
        cases = re.findall(r"`([^`]+)`", cells[1]) if "±" in line else []
        for column, cell in zip(header, cells, strict=False):
            if "±" in cell:
                name, _, size = column.partition(", ")
                heading = "published numbers" if name == "measured" else name
                # The second case of a row, if there is one, is that of mnist5k.
                case = cases[-1] if name == "mnist5k" else cases[0]
                assert results[heading, case, size].startswith(cell), (column, case)
        rows += bool(cases)
    assert rows > 15


def test_tutorials_are_read_in_order() -> None:
    listed = re.findall(r"- (\d)\. .*: (tutorials/\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {path for _, path in listed} == {f"tutorials/{path.name}" for path in (DOCS / "tutorials").glob("*.md")}
    for position, (number, path) in enumerate(listed, 1):
        text = (DOCS / path).read_text(encoding="utf-8")
        assert text.startswith(f"# {number}. ")
        assert int(number) == position
        if position < len(listed):
            assert f"Next: [{position + 1}. " in text
