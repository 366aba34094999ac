"""Progress messages during training: on a terminal, in a file, and from several workers."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar

from dcl_lightning import FineTuning
from dcl_lightning.callbacks import progress
from tests.conformance.small_stream import make_agent, make_data

ROOT = Path(__file__).parent.parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clockwork(Callback):
    """Each training batch takes a second, and nothing else takes any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def on_train_batch_start(self, *args: object) -> None:
        self.now += 1


def fit(folder: Path, callbacks: list[Callback], data=None, **kwargs) -> FineTuning:
    data = data or make_data()  # three tasks of 14 samples, in batches of 5
    agent = make_agent("base", data)
    agent.report.show_table = False
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False} | kwargs
    trainer = pl.Trainer(default_root_dir=folder, accelerator="cpu", callbacks=callbacks, **options)
    trainer.fit(agent, datamodule=data)
    return agent


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_lightnings_bars_tell_task_epoch_and_the_time_left_for_the_stream(
    bar: type[ProgressBar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "__stdout__", out)
    told: list[str] = []
    if bar is RichProgressBar:
        from rich.progress import Progress

        original = Progress.update
        monkeypatch.setattr(
            Progress, "update", lambda self, *a, **k: (told.append(k.get("description", "")), original(self, *a, **k))
        )
    fit(tmp_path, [bar(), Clockwork(monkeypatch)])
    # Rich draws from a thread when it likes.
    text = out.getvalue() if bar is TQDMProgressBar else "\n".join(told)
    assert {f"task {t} ({t + 1} of 3) · epoch {e}/2" for t in (0, 1, 2) for e in (1, 2)} <= set(
        re.findall(r"task . \(. of .\) · epoch ./.", text)
    )
    # 18 batches in all, of a second each; after the k-th of them 18 - k are left.
    left = [int(s) for s in re.findall(r"0:00:(\d\d) left", text)]
    assert set(left) == set(range(18))


def test_the_time_left_knows_tasks_that_grow_and_a_limit_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(progress, "show", told.append)
    # 3, 6 and 9 batches an epoch, two epochs each.
    fit(tmp_path, [Clockwork(monkeypatch)], make_data(concatenate_tasksets=True))
    assert [line.split(" · ")[-1] for line in told] == ["2 epochs of 14 samples", "0:00:30 left", "0:00:18 left"]
    told.clear()
    fit(tmp_path, [Clockwork(monkeypatch)], make_data(concatenate_tasksets=True), max_steps=10)
    assert told[1].endswith(f" · {timedelta(seconds=4)} left")


def test_elsewhere_than_on_a_terminal_there_is_one_line_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, [])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("task ")]
    assert [line[:15] for line in lines] == [f"task {t} ({t + 1} of 3)" for t in range(3)]


class Own(ProgressBar):
    def enable(self) -> None: ...

    def disable(self) -> None:
        raise AssertionError("a bar of the user's own making is left alone")


def test_a_bar_of_the_users_own_making_is_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, [Own()])


def test_embedded_in_a_fit_without_a_stream_it_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1}
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[progress.StreamProgress()], **options)
    trainer.fit(BoringModel())
    assert "task" not in capsys.readouterr().out


def seen_on(terminal: str) -> list[str]:
    """Return the lines that are left on a terminal: what Rich draws anew it has erased before."""
    lines, row = [""], 0
    for up, part in re.findall(r"\x1b\[(\d+)A|(\n|\r|\x1b\[2K|\x1b\[[\d;?]*[a-zA-Z]|[^\x1b\n\r]+)", terminal):
        if up:
            row -= int(up)
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return lines


def test_on_a_real_terminal_one_of_two_horovod_workers_shows_a_table_and_a_bar(tmp_path: Path) -> None:
    pytest.importorskip("horovod")
    pytest.importorskip("rich")
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    config = str(ROOT / "configs" / "base_digits.yaml")
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", config, "--model.epochs_per_task", "1"]
    command += ["--trainer.limit_train_batches", "2", "--trainer.strategy", "horovod", "--trainer.devices", "2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    out = b""
    try:
        while chunk := os.read(main, 65536):
            out += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = out.decode(errors="replace")
    assert re.search(r"task 4 \(5 of 5\) · epoch 1/1[^\n]*loss: \d", text)  # in one line
    assert "v_num" not in text
    # The other worker's output is no terminal: it would say this.
    assert " epoch of " not in text
    lines = seen_on(text)  # nothing twice
    assert max(map(len, lines)) <= 80
    (start,) = (row for row, line in enumerate(lines) if line.startswith("Accuracy in %"))
    assert lines[start].strip() == "Accuracy in % after 5 of 5 tasks"
    report = json.loads(next(tmp_path.rglob("accuracy_matrix.json")).read_text())
    table = {line.split()[0]: line.split() for line in lines[start + 3 :] if line.split()}
    for task, accuracy in enumerate(report["matrix"][-1]):
        assert table[str(task)][3] == f"{100 * accuracy:.1f}"
    assert table["mean"][1:3] == [f"{100 * report[name]:.1f}" for name in ("average_accuracy", "forgetting")]
    assert [len([line for line in lines if words in line]) for words in ("loss:", "Result:", "Report:", "Show:")] == [
        1
    ] * 4
    assert [line.split(":")[0] for line in lines[-4:]] == ["Result", "Report", "Show", ""]
