"""The guides to an agent, a policy and a data set, each followed to the letter in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks, commands

AGENT, POLICY, DATA = (ROOT / "docs" / "guides" / f"{name}.md" for name in ("agent", "policy", "data"))
PARTS = ("dcl_lightning", "configs", "benchmarks", "docs", "tests")
FILES = ("cli.py", "README.md", "RESULTS.md", "CITATION.cff", "pyproject.toml", "mkdocs.yml")


def changes(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the files that a block of ``+`` and ``-`` changes, each with the lines of one place in it."""
    path, lines = "", []
    for line in [*text.splitlines(), "@@"]:
        if line == "@@" or line.startswith("--- "):
            if lines:
                yield path, lines
            lines = []
            path = line[4:] if line.startswith("--- ") else path
        else:
            lines.append(line)


def change(path: Path, lines: list[str]) -> None:
    """Change the one place that the lines without a ``+`` are found at."""
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != sign) + "\n" for sign in "+-")
    content = path.read_text(encoding="utf-8")
    assert content.count("\n" + before) == 1, (path.name, before)
    path.write_text(content.replace("\n" + before, "\n" + after), encoding="utf-8")


def copied(folder: Path) -> None:
    for name in PARTS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


def run(folder: Path, words: list[str]) -> str:
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    # The copy stands before the project that is installed.
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def linted(folder: Path, *paths: str) -> None:
    """Check the changed files as ``make lint`` does."""
    ruff = str(Path(sys.executable).parent / "ruff")
    run(folder, [ruff, "check", *paths])
    run(folder, [ruff, "format", "--check", *paths])


def followed(folder: Path, guide: Path) -> None:
    """Make the changes of a guide, without its commands that train or test."""
    copied(folder)
    for block in blocks(guide):
        if block.file is not None:
            (folder / block.file).write_text(block.text.split("\n", 1)[1], encoding="utf-8")
        elif block.language == "diff":
            for path, lines in changes(block.text):
                change(folder / path, lines)
        elif block.language == "bash" and block.text.startswith("mv "):
            run(folder, block.text.split())


# What the guide's commands are, shortened: one process for all of them.
SHORT = """
import sys, pytest
from dcl_lightning import cli
few = ["--model.epochs_per_task", "1", "--trainer.limit_train_batches", "2"]
assert cli.main(["fit", "--config", "configs/fading_digits.yaml", *few]) == 0
assert cli.main(["cite", "--model", "fading"]) == 0
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/agents/test_fading.py"]))
"""


def test_the_agent_of_the_guide_comes_to_be(tmp_path: Path) -> None:
    followed(tmp_path, AGENT)
    assert "1 passed" in run(tmp_path, ["python", "-c", SHORT])
    report = tmp_path / "runs/fading_digits/version_0/report/summary.md"
    assert report.read_text(encoding="utf-8").startswith("# fading on digits")
    linted(tmp_path, "dcl_lightning", "tests/agents/test_fading.py", "benchmarks/protocol.py")


POLICY_TESTS = """
import sys, pytest
from dcl_lightning import cli
few = ["--model.epochs_per_task", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
window = ["--model", "er", "--model.rehearsal.policy", "window", "--model.rehearsal.buffer_size", "50"]
assert cli.main(["fit", *window, "--data.dataset", "digits", *few]) == 0
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/memory/test_window.py"]))
"""


@pytest.mark.exhaustive  # the guide to an agent walks the same way in every run
def test_the_policy_of_the_guide_comes_to_be(tmp_path: Path) -> None:
    followed(tmp_path, POLICY)
    assert "1 passed" in run(tmp_path, ["python", "-c", POLICY_TESTS])
    linted(tmp_path, "dcl_lightning/memory", "tests/memory/test_window.py")


@pytest.mark.exhaustive  # the guide to an agent walks the same way in every run
def test_the_data_set_of_the_guide_comes_to_be(tmp_path: Path) -> None:
    followed(tmp_path, DATA)
    assert "2 passed" in run(tmp_path, ["python", "-m", "pytest", "-q", "tests/data/test_stripes.py"])
    linted(tmp_path, "dcl_lightning/data", "tests/data/test_stripes.py")


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_command_of_the_guide_as_it_stands(tmp_path: Path) -> None:
    followed(tmp_path, AGENT)
    lines = [list(command.words) for command in commands(AGENT) if command.words[0] == "python"]
    assert len(lines) == 5
    first, *others = lines
    # The first is of a file beside cli.py, before it is moved.
    shutil.copy(tmp_path / "dcl_lightning/agents/fading.py", tmp_path / "fading.py")
    run(tmp_path, first)
    (tmp_path / "fading.py").unlink()
    for words in others:
        out = run(tmp_path, words)
        if "pytest" in words:
            assert re.search(r"\b[1-9]\d* passed", out)
            assert "failed" not in out
    run(tmp_path, [str(Path(sys.executable).parent / "mypy")])
    rows = re.findall(
        r"^\| `fading` \| (\d+) \|.*$", (tmp_path / "RESULTS.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert rows == ["50", "200"]
