"""Reports of real runs: their counts, on streams of every kind, and after resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from dcl_lightning import ContinualDataModule, TaskReport
from tests.conformance.rehearsal_runs import make_nil
from tests.conformance.small_stream import arrays, make_agent, make_data, make_trainer


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "report/accuracy_matrix.json").read_text())


def lines_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / name).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.pictures
def test_every_file_of_a_stream_of_six_classes(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data, task_aware=True)
    trainer = make_trainer(tmp_path)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, TaskReport)]
    trainer.fit(agent, datamodule=data)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "accuracy_matrix.json", "accuracy_matrix.csv", "accuracy_matrix.png", "accuracy_matrix_top5.csv",
        "accuracy_matrix_task_aware.csv", "accuracy_matrix_task_aware.png", "accuracy_of_classes.csv",
        "accuracy_of_classes.png", "accuracy_of_tasks.png", "accuracy_and_forgetting.png", "buffer.csv",
        "buffer_classes.png", "buffer_fill.png", "confusion_matrix.csv", "confusion_matrix.png",
        "figures_over_tasks.csv", "index.html", "summary.md",
    }  # fmt: skip
    summary = (tmp_path / "report/summary.md").read_text()
    assert "max-last: mean over j < T-1" in summary
    for name in (tmp_path / "report").glob("*.png"):
        assert f"({name.name})" in summary
        assert name.read_bytes().startswith(b"\x89PNG")
    facts = facts_of(tmp_path)
    # Told the task, an agent chooses between two classes; so it is right at least as often.
    assert facts["average_accuracy_task_aware"] >= facts["average_accuracy"]
    assert facts["top5"]["average_accuracy"] >= facts["average_accuracy"]
    confusion = [[int(v) for v in list(line.values())[1:]] for line in lines_of(tmp_path, "confusion_matrix.csv")]
    right = sum(confusion[y][y] for y in range(6))
    assert right / 42 == pytest.approx(facts["pooled_accuracy"])
    classes = lines_of(tmp_path, "accuracy_of_classes.csv")
    assert classes[0]["5"] == ""
    assert float(classes[2]["3"]) == pytest.approx(confusion[3][3] / 7)
    over = lines_of(tmp_path, "figures_over_tasks.csv")
    assert float(over[-1]["forgetting"]) == pytest.approx(facts["forgetting"])
    assert over[0]["forgetting"] == ""


def test_exemplars_are_counted_and_told_from_new_samples(tmp_path: Path) -> None:
    data = make_data()
    make_trainer(tmp_path).fit(make_agent("icarl", data), datamodule=data)
    facts = facts_of(tmp_path)
    assert facts["buffer_rows"] == {"nominal": 12, "stored": 12, "distinct": 12}
    assert facts["buffer_bytes"] > 0
    # Two epochs of 14 samples a task; besides them 12 exemplars in each of the tasks 1 and 2.
    assert facts["samples_seen"] == {"new": 84, "rehearsed": 48}
    lines = lines_of(tmp_path, "buffer.csv")
    assert [(row["class"], row["rows"], row["worker"]) for row in lines if row["task"] == "1"] == [
        (str(y), "3", "all") for y in range(4)
    ]
    # 14 samples and 12 exemplars make 6 batches of 5, twice: 12 steps a task from the second on.
    ages = {row["class"]: float(row["age"]) for row in lines if row["task"] == "2"}
    assert ages["4"] == 0
    assert ages["2"] == 12
    assert ages["0"] == 24


def test_a_memory_counts_rows_ages_and_draws(tmp_path: Path) -> None:
    data = make_data()
    agent = make_nil(data, policy="class_balanced", weighting="none")
    drawn: list[int] = []
    inner = agent.training_loss
    agent.training_loss = lambda batch: (drawn.append(len(batch.targets) - batch.num_new), inner(batch))[1]
    make_trainer(tmp_path).fit(agent, datamodule=data)
    buffer = agent.rehearsal.manager.buffer
    lines = [row for row in lines_of(tmp_path, "buffer.csv") if row["task"] == "2"]
    stored = {int(row["class"]): int(row["rows"]) for row in lines}
    assert [stored.get(y, 0) for y in range(6)] == buffer.class_counts.tolist()
    assert all(int(row["origin_task"]) == int(row["class"]) // 2 for row in lines)
    facts = facts_of(tmp_path)
    assert facts["buffer_rows"] == {"nominal": 12, "stored": len(buffer), "distinct": len(buffer)}
    assert facts["samples_seen"] == {"new": 84, "rehearsed": sum(drawn)}
    # Rows that left took their counts along: what is left was drawn at most as often as all rows together.
    counted = sum(float(row["drawn"]) * int(row["rows"]) for row in lines)
    assert 0 < counted <= sum(drawn)
    oldest, newest = float(lines[0]["age"]), float(lines[-1]["age"])
    assert newest < oldest <= buffer.state.offers == 18


def test_a_task_without_test_samples(tmp_path: Path) -> None:
    x, y, x_test, y_test = arrays()
    kept = (y_test != 2) & (y_test != 3)
    data = ContinualDataModule((x, y, x_test[kept], y_test[kept]), increment=2, batch_size=5, seed=0)
    make_trainer(tmp_path).fit(make_agent("base", data, task_aware=True), datamodule=data)
    facts = facts_of(tmp_path)
    assert [row[1] for row in facts["matrix"]] == [None, None, None]
    last = facts["matrix"][-1]
    assert facts["average_accuracy"] == pytest.approx((last[0] + last[2]) / 2)
    assert facts["forgetting"] == pytest.approx(max(facts["matrix"][i][0] for i in (0, 1)) - last[0])
    assert facts["task_test_samples"] == [14, 0, 14]
    assert facts["pooled_accuracy_after_task"][1] == facts["matrix"][1][0]


def test_nothing_is_carried_from_one_evaluation_to_the_next(tmp_path: Path) -> None:
    """A network that always says class 0, with validations before training, within tasks and at their ends."""
    x, y, _, _ = arrays(num_classes=4)
    data = ContinualDataModule((x, y, x, y), increment=2, batch_size=5, validate_on="test", seed=0)
    agent = make_agent("base", data)
    agent.evaluate = lambda batch: torch.eye(4).to(batch.targets.device)[torch.zeros_like(batch.targets)]
    logged: list[float] = []
    inner = agent._log_counts
    agent._log_counts = lambda stage: (inner(stage), logged.append(float(agent.trainer.callback_metrics["val/acc"])))
    make_trainer(tmp_path, num_sanity_val_steps=2).fit(agent, datamodule=data)
    assert facts_of(tmp_path)["matrix"] == [[0.5, None], [0.5, 0.0]]
    # Before training and twice in each task: over task 0, then over both.
    assert logged == [0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("future", [False, True])
def test_rows_stay_as_they_were_written(tmp_path: Path, future: bool) -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.rows: list[list[float]] = []

        def on_task_evaluated(self, trainer, agent, task) -> None:
            values = agent.clock.matrix.values.nan_to_num(-1)
            assert values[: task.index].tolist() == self.rows
            self.rows = values[: task.index + 1].tolist()

    watch, data = Watch(), make_data()
    agent = make_agent("base", data, future_tasks=future)
    make_trainer(tmp_path, [watch]).fit(agent, datamodule=data)
    assert len(watch.rows) == 3
    assert (watch.rows[0][1:] == [-1, -1]) != future
    assert facts_of(tmp_path)["average_accuracy"] == pytest.approx(sum(watch.rows[-1]) / 3)


def test_one_task(tmp_path: Path) -> None:
    data = make_data(scenario="none")
    make_trainer(tmp_path).fit(make_agent("base", data), datamodule=data)
    facts = facts_of(tmp_path)
    assert facts["average_accuracy"] == facts["pooled_accuracy"]
    assert facts["forgetting"] is facts["learning_accuracy"] is facts["top5"]["forgetting"] is None


def test_forward_transfer_where_tasks_share_their_classes_only(tmp_path: Path) -> None:
    data = make_data(scenario="domain", num_tasks=2)
    agent = make_agent("base", data, future_tasks=True)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    facts = facts_of(tmp_path)
    ahead, before = facts["matrix"][0][1], float(agent.results.baseline[1])
    assert facts["forward_transfer"] == pytest.approx(ahead - before)
    data, folder = make_data(), tmp_path / "by_class"
    make_trainer(folder).fit(make_agent("base", data, future_tasks=True), datamodule=data)
    facts = facts_of(folder)
    assert facts["matrix"][0][2] == 0, "of classes not seen yet"
    assert facts["forward_transfer"] is None


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_task_aware_accuracy_in_validate_and_test_alone(tmp_path: Path, stage: str) -> None:
    data = make_data()
    agent = make_agent("base", data, task_aware=True)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    logged = getattr(make_trainer(tmp_path), stage)(agent, datamodule=data, verbose=False)[0]
    assert logged[f"{stage[:3] if stage == 'validate' else stage}/acc_task_aware"] == pytest.approx(
        facts_of(tmp_path)["pooled_accuracy_task_aware"]
    )


def test_a_resumed_run_reports_what_the_whole_run_does(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(folder: Path, ckpt: Path | None = None) -> None:
        saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        data = make_data()
        agent = make_nil(data, agent={"task_aware": True})
        make_trainer(folder, [saver]).fit(agent, datamodule=data, ckpt_path=ckpt)

    run(tmp_path / "whole")
    for step in (6, 8):  # the end of task 0, and within task 1
        run(tmp_path / f"from_{step}", tmp_path / f"whole/step={step}.ckpt")
        for name in ("accuracy_of_classes.csv", "confusion_matrix.csv", "buffer.csv", "figures_over_tasks.csv"):
            texts = [(tmp_path / run / "report" / name).read_text() for run in ("whole", f"from_{step}")]
            assert texts[0] == texts[1], name
        one, other = facts_of(tmp_path / "whole"), facts_of(tmp_path / f"from_{step}")
        for measured in ("wall_time_s", "peak_host_bytes", "peak_device_bytes"):
            del one[measured], other[measured]
        assert one == other


def test_the_matrix_goes_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = make_data()
    trainer = make_trainer(tmp_path)
    logger = TensorBoardLogger(tmp_path, name="board")
    trainer.loggers = [logger]
    next(c for c in trainer.callbacks if isinstance(c, TaskReport)).pictures = True
    trainer.fit(make_agent("base", data), datamodule=data)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert len(events.Images("cl/accuracy_matrix")) == 3
    assert len(events.Scalars("cl/average_accuracy")) == 3


def test_evaluation_fetches_nothing_between_batches() -> None:
    from dcl_lightning.metrics.evaluation import StreamResults

    results = StreamResults([[0, 1], [2, 3], [4, 5]], 6, task_aware=True)
    counts = results.new_counts()
    # A tensor without data cannot be fetched: this raises where the host would have to wait for it.
    scores, targets = torch.zeros(4, 6, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    counts.add(0, scores, targets)
