"""The Python code in README and guides runs as printed, and so do the three baselines; README's figures are results."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from dcl_lightning import cli
from tests.documents import PAGES, ROOT, Block, blocks, commands, write_files

# Files within the project are of the guide that tests/test_guide.py follows.
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(b for b in blocks(page) if b.language == "python" and "/" not in (b.file or ""))
]
_LINE = r"^python cli\.py (fit --config configs/base_digits\.yaml.*)$"
BASELINES = re.findall(_LINE, (ROOT / "docs/from_the_original.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs(tmp_path: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, block.page)
    (tmp_path / "block.py").write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fading", raising=False)
    # In this process: most of a small script's time are the imports.
    runpy.run_path(str(tmp_path / "block.py"), run_name="__main__")
    if "ContinualDataModule(" in block.text and "TaskClock(" not in block.text:  # an agent writes a report
        assert list(tmp_path.rglob("report/accuracy_matrix.json"))


def test_the_figures_of_the_readme_are_results() -> None:
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S+ ± \S+) \| (\S+ ± \S+) \|$", PAGES[0].read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 3
    for agent, ours, published in rows:
        (line,) = re.findall(rf"^.*\(`aml_{agent}_cifar10_m100`\).*$", results, re.MULTILINE)
        assert f"| {published} (3) | {ours} (3) |" in line


def test_the_agent_of_the_tutorial_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/tutorials/agent.md"
    command = next(command for command in commands(page) if "fit" in command.words)
    write_files(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main([*command.words[1:], "--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "3"]) == 0
    report = json.loads((tmp_path / "runs/dcl/version_0/report/accuracy_matrix.json").read_text())
    assert report["agent"] == "Focal"
    assert report["samples_seen"]["rehearsed"] > 100


def run_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[dict[str, Any]]:
    """Return the reports of naive, transfer and scratch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    reports = []
    for number, line in enumerate(BASELINES):
        assert cli.main([*shlex.split(line, comments=True), *flags]) == 0
        report = tmp_path / f"runs/base_digits/version_{number}/report/accuracy_matrix.json"
        reports.append(json.loads(report.read_text()))
    return reports


def test_the_three_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model.epochs_per_task", "2", "--model.momentum", "0.9", "--data.batch_size", "64"]
    reports = run_baselines(tmp_path, monkeypatch, *flags, "--trainer.enable_progress_bar", "false")
    naive, transfer, scratch = (report["average_accuracy"] for report in reports)
    # 19, 95 and 94 % after ten epochs a task without momentum.
    assert naive < 0.4
    assert min(transfer, scratch) > 0.7


def test_the_three_baselines_of_another_network_and_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model.backbone", "resnet", "--model.backbone.depth", "20", "--model.epochs_per_task", "1"]
    flags += ["--data.dataset", "synthetic"]
    flags += ["--data.source_options", '{"size": 12, "num_classes": 4, "per_class": 8}']
    reports = run_baselines(tmp_path, monkeypatch, *flags)
    # Two tasks of 16 images; transfer and scratch train on those of both in the second.
    assert [report["samples_seen"]["new"] for report in reports] == [32, 48, 48]
