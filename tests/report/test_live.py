"""The table of tasks on a terminal, against NumPy."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dcl_lightning.callbacks.report import TaskReport
from tests.callbacks.test_report import Clock, FakeAgent, make_trainer

rich_console = pytest.importorskip("rich.console")

from dcl_lightning.callbacks.progress import StreamBar  # noqa: E402 (Rich is there)
from dcl_lightning.report.live import TaskTable  # noqa: E402 (it imports Rich)


def drawn(table: TaskTable, width: int = 80, **options: object) -> str:
    console = rich_console.Console(file=io.StringIO(), width=width, **options)
    console.print(table)
    return console.file.getvalue()


def table_of(matrix: np.ndarray, rows: int = 15, classes: list[list[str]] | None = None) -> TaskTable:
    size = len(matrix)
    seconds = {t: 61.0 * (t + 1) for t in range(size)}
    labels = classes or [[f"a{t}", f"b{t}"] for t in range(size)]
    return TaskTable("So far", torch.tensor(matrix), labels, [(3, 3)] * (size - 1) + [(1, 3)], seconds, rows)


@pytest.mark.parametrize("future", [False, True])
def test_every_figure_is_numpys(future: bool) -> None:
    """With ``future_tasks`` there are entries above the diagonal, from before a task was learnt."""
    rng, size = np.random.default_rng(0), 7
    matrix = rng.random((size, size))
    matrix[0, 3] = 1.0  # before it was learnt
    known = matrix if future else np.where(np.tri(size, dtype=bool), matrix, np.nan)
    lines = [line.split() for line in drawn(table_of(known)).splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in (*map(str, range(size)), "mean")}
    lost = []
    for t in range(size):
        learnt = matrix[t:, t]
        lost += [] if t == size - 1 else [learnt[:-1].max() - learnt[-1]]
        forgotten = "-" if t == size - 1 else f"{100 * lost[-1]:.1f}"
        epochs = ["1", "of", "3"] if t == size - 1 else ["3"]
        shown = [
            f"a{t},",
            f"b{t}",
            f"{100 * learnt[-1]:.1f}",
            f"{100 * learnt.max():.1f}",
            forgotten,
            *epochs,
            "0:01:01",
        ]
        assert rows[str(t)] == shown
    assert rows["mean"] == [f"{100 * matrix[-1].mean():.1f}", f"{100 * np.mean(lost):.1f}"]


def test_it_fits_in_a_terminal_and_leaves_earlier_tasks_out() -> None:
    long = [[f"a class with a long name {t}, {n}" for n in range(9)] for t in range(30)]
    text = drawn(table_of(np.tri(30), 5, long))
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"^ +(\d+) ", text, re.MULTILINE) == ["25", "26", "27", "28", "29"]
    assert text.count("…") == 5


def test_what_is_unknown_is_a_dash_and_one_task_has_no_mean() -> None:
    table = TaskTable(
        "", torch.tensor([[math.nan, math.nan], [math.nan, 0.5]]), [["a"], ["b"]], [(1, 1)] * 2, {1: 9.0}, 9
    )
    rows = [line.split() for line in drawn(table).splitlines()]
    assert ["0", "a", "-", "-", "-", "1", "-"] in rows
    assert ["1", "b", "50.0", "50.0", "-", "1", "-"] in rows
    assert "mean" not in drawn(table_of(np.ones((1, 1))))


def test_colours_are_the_pages_and_it_is_drawn_once_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    table, made = table_of(np.array([[1.0]])), []
    original = TaskTable._table
    monkeypatch.setattr(TaskTable, "_table", lambda self: (made.append(1), original(self))[1])
    coloured = drawn(table, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;0;0;0;48;2;253;231;37m   100.0" in coloured  # black on viridis' last colour, #fde725
    drawn(table), drawn(table, 60)
    assert made == [1, 1]


def test_a_report_gives_it_to_the_bar_also_at_the_start_of_a_resumed_run(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, bar = Clock(3, 1), StreamBar()
    trainer = make_trainer(tmp_path, clock, progress_bar_callback=bar)
    report = TaskReport(pictures=False)
    report.on_task_evaluated(trainer, FakeAgent(), clock.tasks[0])
    assert not capsys.readouterr().out
    assert "after 1 of 3 tasks" in drawn(bar.table)
    assert re.search(r"0 +a0, b\|0 +100.0 +100.0 +- +3 +0:00:03", drawn(bar.table))
    bar.table, again = None, TaskReport(pictures=False)
    again.load_state_dict(report.state_dict())
    again.on_train_start(trainer, FakeAgent())
    assert "0:00:03" in drawn(bar.table)
    bar.table, old = None, TaskReport(pictures=False)
    old.load_state_dict({"memory": report.state_dict()["memory"]})  # of a version that did not measure
    old.on_train_start(trainer, FakeAgent())
    assert re.search(r"- +3 +-", drawn(bar.table))
    bar.disable()
    again.on_task_evaluated(trainer, FakeAgent(), clock.tasks[0])
    assert "after 1 of 3 tasks" in capsys.readouterr().out


def test_without_a_table_nothing_is_drawn(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    clock, bar = Clock(3, 1), StreamBar()
    trainer = make_trainer(tmp_path, clock, progress_bar_callback=bar)
    silent = TaskReport(show_table=False, pictures=False)
    silent.on_train_start(trainer, FakeAgent())
    silent.on_task_evaluated(trainer, FakeAgent(), clock.tasks[0])
    TaskReport().on_train_start(make_trainer(tmp_path, SimpleNamespace(), progress_bar_callback=bar), FakeAgent())
    assert bar.table is None
    assert not capsys.readouterr().out
