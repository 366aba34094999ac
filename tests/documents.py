"""What README and documents tell users to type: code blocks, commands, and files given as blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RESULTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"bash", "console", "diff", "python", "text", "yaml"}
# What is typed to a shell begins so, also within a sentence.
PROGRAMS = "dcl-lightning|python|make|pip|horovodrun|mpirun|docker|pytest|pre-commit|fit|validate|test|predict"
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(rf"`((?:[A-Z_]+=\S+ )?(?:{PROGRAMS}) [^`]+)`")
_FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")


class Block(NamedTuple):
    """A fenced block: where it stands, its language and what is in it."""

    page: Path
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that the block is, as its first line tells."""
        found = _FILE.match(self.text)
        return found[1] if found else None


class Command(NamedTuple):
    """One command, as words without comments."""

    page: Path
    words: tuple[str, ...]

    @property
    def line(self) -> str:
        return shlex.join(self.words)


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [Block(page, *found.groups()) for found in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[Command]:
    """Return what a page tells to type, in blocks and in sentences, each once."""
    lines: list[str] = []
    for block in blocks(page):
        text = block.text.replace("\\\n", " ")
        if block.language == "bash":
            lines += text.splitlines()
        if block.language == "console":
            lines += [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    lines += [" ".join(found.split()) for found in _INLINE.findall(prose)]
    split = (shlex.split(line, comments=True) for line in lines)
    return [Command(page, words) for words in dict.fromkeys(tuple(words) for words in split if words)]


def write_files(folder: Path, page: Path) -> None:
    """Write those blocks of a page that are files of the reader's own folder."""
    for block in blocks(page):
        if block.file is not None and "/" not in block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
