"""The report callback: what it writes, when, and with which warnings."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dcl_lightning.callbacks import TaskClock
from dcl_lightning.callbacks.report import TaskReport
from dcl_lightning.callbacks.task_clock import TaskSchedule
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.metrics.evaluation import StreamResults
from dcl_lightning.report.text import table_text
from dcl_lightning.types import Task

KEYS = [
    "matrix",
    "task_classes",
    "task_epochs",
    "planned_epochs",
    "task_samples",
    "average_accuracy",
    "average_incremental_accuracy",
    "pooled_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "top5",
    "agent",
    "dataset",
    "seed",
    "world_size",
    "num_parameters",
    "buffer_bytes",
    "evaluated_on",
    "selection",
    "optimizer_steps",
    "samples_seen",
    "buffer_rows",
    "peak_host_bytes",
    "peak_device_bytes",
    "wall_time_s",
    "config_hash",
    "versions",
]

pytestmark = pytest.mark.pictures


class Clock(TaskClock):
    """A task clock at a place in a stream."""

    def __init__(self, num_tasks=3, rows=3):
        super().__init__(epochs_per_task=3)
        self.schedule = TaskSchedule.of([3] * num_tasks)
        self.schedule.end_task_with(3)  # task 1 after its first epoch
        self.results = StreamResults([(2 * t, 2 * t + 1) for t in range(num_tasks)], 2 * num_tasks)
        self.schedule.evaluated = rows
        self.tasks = [Task(t, num_tasks, (2 * t, 2 * t + 1), (f"a{t}", f"b|{t}"), 50, 2) for t in range(num_tasks)]
        self.stopwatch.reset({"train": 1.5, "data": 0.01, "task_end": 0.5, "evaluate": 0.7})
        self._samples.seen = {"new": 100, "rehearsed": 0}
        self._scores = lambda batch: batch
        for i in range(rows):
            for j in range(i + 1):
                self.matrix.add_counts(20 - 4 * (i - j), 20, i, j)


class FakeAgent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.teacher = nn.Linear(3, 2).requires_grad_(False)
        self.hparams = {}


class FakeTrainer:
    def __init__(self, **values):
        vars(self).update(values)


def make_trainer(folder, *callbacks, **kwargs):
    options = {"increment": 2, "val_ratio": 0.05}
    data = SimpleNamespace(dataset_name="toys", seed=7, evaluate_on="test", validate_on="test", options=options)
    defaults = {
        "callbacks": list(callbacks),
        "datamodule": data,
        "log_dir": str(folder),
        "default_root_dir": str(folder),
        "is_global_zero": True,
        "world_size": 2,
        "global_step": 42,
        "fast_dev_run": 0,
        "lr_scheduler_configs": [],
        "progress_bar_callback": None,
    }
    defaults["loggers"] = [SimpleNamespace(log_dir=str(folder), log_metrics=lambda *_, **__: None)]
    return FakeTrainer(**{**defaults, **kwargs})


def read(folder):
    def refuse(text):
        raise AssertionError(text)

    return json.loads((folder / "report/accuracy_matrix.json").read_text(), parse_constant=refuse)


def test_files_and_facts(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    report, trainer, agent = TaskReport(), make_trainer(tmp_path, Clock()), FakeAgent()
    report.on_train_end(trainer, agent)
    out = capsys.readouterr().out
    assert f"Report: {tmp_path / 'report'}" in out
    assert "Result: FakeAgent on toys: 80.0 % average accuracy, forgetting 30.0, 0:00:03" in out
    assert f"Show:   dcl-lightning report {tmp_path}" in out
    facts = read(tmp_path)
    assert set(KEYS) <= set(facts)
    assert facts["matrix"] == [[1.0, None, None], [0.8, 1.0, None], [0.6, 0.8, 1.0]]
    assert (facts["task_epochs"], facts["planned_epochs"]) == ([3, 1, 3], [3, 3, 3])
    assert facts["average_accuracy"] == pytest.approx(0.8)
    assert facts["forgetting"] == pytest.approx(0.3)
    assert facts["backward_transfer"] == pytest.approx(-0.3)
    assert facts["forward_transfer"] is None
    assert facts["task_classes"][1] == ["a1", "b|1"]
    assert (facts["agent"], facts["dataset"], facts["seed"]) == ("FakeAgent", "toys", 7)
    assert (facts["world_size"], facts["optimizer_steps"], facts["num_parameters"]) == (2, 42, 8)
    assert len(facts["config_hash"]) == 64
    assert facts["versions"]["torch"]
    assert facts["versions"]["dcl_lightning"]
    with (tmp_path / "report/accuracy_matrix.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["after_task", "task_0", "task_1", "task_2"]
    assert rows[2] == ["1", "0.8", "1.0", ""]
    summary = (tmp_path / "report/summary.md").read_text()
    assert "| seconds | 2.7: train 1.5, task end 0.5, evaluate 0.7 |" in summary
    assert "| task 2 | 60.0 | 80.0 | 100.0 |" in summary
    assert r"| 1 | a1, b\|1 | 50 | 20 | 1 of 3, ended early |" in summary
    assert r"| 2 | a2, b\|2 | 50 | 20 | 3 |" in summary
    assert "| options of the data | increment=2, val_ratio=0.05 |" in summary
    assert (tmp_path / "report/accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in (tmp_path / "report").iterdir() if p.name.startswith(".")]


def test_written_once_a_fit(tmp_path, capsys):
    report, trainer, agent = TaskReport(pictures=False), make_trainer(tmp_path, Clock()), FakeAgent()
    report.on_train_end(trainer, agent)
    report.on_fit_end(trainer, agent)
    assert capsys.readouterr().out.count("Report:") == 1
    report.setup(trainer, agent, "fit")
    report.on_fit_end(trainer, agent)
    assert capsys.readouterr().out.count("Report:") == 1


def test_only_worker_zero_writes_and_prints(tmp_path, capsys):
    trainer = make_trainer(tmp_path, clock := Clock(), is_global_zero=False)
    TaskReport(pictures=False).on_task_evaluated(trainer, FakeAgent(), clock.tasks[2])
    TaskReport(pictures=False).on_train_end(trainer, FakeAgent())
    assert not (tmp_path / "report").exists()
    assert not capsys.readouterr().out


def test_fast_dev_run_leaves_nothing(tmp_path):
    TaskReport(pictures=False).on_train_end(make_trainer(tmp_path, Clock(), fast_dev_run=1), FakeAgent())
    assert not list(tmp_path.iterdir())


def test_one_task_has_nulls(tmp_path):
    TaskReport(pictures=False).on_train_end(make_trainer(tmp_path, Clock(1, 1)), FakeAgent())
    facts = read(tmp_path)
    assert facts["average_accuracy"] == 1.0
    assert facts["forgetting"] is facts["backward_transfer"] is facts["average_incremental_accuracy"] is None


def test_unwritable_folder_only_warns(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        TaskReport(pictures=False).on_train_end(make_trainer(file, Clock()), FakeAgent())


@pytest.mark.parametrize("callbacks", [[], [Clock(2, 0)]])
def test_without_a_matrix_only_warns(tmp_path, callbacks):
    with pytest.warns(UserWarning, match="no task was evaluated"):
        TaskReport(pictures=False).on_train_end(make_trainer(tmp_path, *callbacks), FakeAgent())
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    TaskReport().on_train_end(make_trainer(tmp_path, Clock()), FakeAgent())
    assert {p.suffix for p in (tmp_path / "report").iterdir()} == {".json", ".csv", ".md", ".html"}
    assert "png" not in (tmp_path / "report/summary.md").read_text()


def test_pictures_in_another_style_and_format(tmp_path):
    TaskReport(style="print", formats=["svg", "pdf"]).on_train_end(make_trainer(tmp_path, Clock()), FakeAgent())
    report = tmp_path / "report"
    assert not list(report.glob("*.png"))
    assert {p.stem for p in report.glob("*.svg")} == {p.stem for p in report.glob("*.pdf")} >= {"accuracy_matrix"}
    assert "](accuracy_matrix.svg)" in (report / "summary.md").read_text()
    assert " on " in (report / "accuracy_of_tasks.svg").read_text()
    assert (report / "accuracy_of_tasks.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "colourful"}, "TaskReport.style=colourful: give colour, print,"),
        ({"formats": ["gif"]}, r"TaskReport.formats=\['gif'\]: give one or several of png, pdf, svg"),
        ({"formats": []}, r"TaskReport.formats=\[\]"),
    ],
)
def test_an_unknown_style_or_format_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        TaskReport(**options)


@pytest.mark.parametrize(
    ("monitor", "evaluate_on", "validate_on", "selection"),
    [
        ("train/loss", "test", "held_out", "none"),
        ("val/acc", "test", "held_out", "validation"),
        ("val/acc", "test", "test", "test"),
        ("val/acc", "held_out", "held_out", "held_out"),
        ("val/acc", "held_out", "test", "validation"),
    ],
)
def test_selection_is_told(tmp_path, monitor, evaluate_on, validate_on, selection):
    trainer = make_trainer(tmp_path, Clock(), SimpleNamespace(monitor=monitor))
    trainer.datamodule.evaluate_on, trainer.datamodule.validate_on = evaluate_on, validate_on
    TaskReport(pictures=False).on_train_end(trainer, FakeAgent())
    assert (read(tmp_path)["evaluated_on"], read(tmp_path)["selection"]) == (evaluate_on, selection)


def test_table_after_a_task(tmp_path, capsys):
    clock = Clock(3, 2)
    TaskReport(pictures=False).on_task_evaluated(make_trainer(tmp_path, clock), FakeAgent(), clock.tasks[1])
    lines = capsys.readouterr().out.strip().splitlines()
    assert "after 2 of 3 tasks" in lines[0]
    assert lines[-2].split() == ["1", "|", "80.0", "100.0", "|", "90.0"]
    assert len({len(line) for line in lines[1:-1]}) == 1
    figures = "average accuracy 90.0, over all samples 90.0, forgetting (max-last) 20.0, backward transfer -20.0"
    assert lines[-1] == figures


def test_a_long_stream_stays_narrow():
    lines = table_text(torch.ones(60, 60, dtype=torch.float64).tril(), 100).splitlines()
    assert len(lines) == 18
    assert max(map(len, lines)) < 150


def test_figures_go_to_the_loggers(tmp_path):
    logged = []
    logger = SimpleNamespace(log_metrics=lambda figures, step: logged.append((figures, step)))
    clock = Clock(3, 2)
    TaskReport(show_table=False, pictures=False).on_task_evaluated(
        make_trainer(tmp_path, clock, loggers=[logger]), FakeAgent(), clock.tasks[1]
    )
    figures, _ = logged[0]
    assert figures["cl/average_accuracy"] == pytest.approx(0.9)
    assert {"cl/forgetting", "cl/backward_transfer", "task"} <= set(figures)
