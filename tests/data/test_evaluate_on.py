"""``data.evaluate_on: held_out``: figures of samples that are never trained on and never stored, and that say so."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from dcl_lightning import ContinualDataModule, cli
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.report.text import SAMPLES
from tests.conformance.agents import make
from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix, weights
from tests.distributed.programs.streams import held_out_run
from tests.distributed.workers import assert_ended_well, run_workers

HELD = {"val_ratio": 0.3, "evaluate_on": "held_out"}
STREAMS: dict[str, dict[str, Any]] = {
    "class": {},
    "concatenated": {"concatenate_tasksets": True},
    "domain": {"scenario": "domain", "num_tasks": 3, "sample_order": "shuffled"},
    "blurry": {"scenario": "blurry", "blurriness": 0.3},
    "none": {"scenario": "none"},
}


def stream(kind: str, **kwargs: Any) -> ContinualDataModule:
    data = make_data(**HELD, **STREAMS[kind], **kwargs)
    data.setup()
    return data


@pytest.mark.parametrize("sharding", ["epoch", "fixed"])
@pytest.mark.parametrize("kind", STREAMS)
def test_each_hold_out_is_tested_once_with_its_task_on_any_number_of_workers(kind: str, sharding: str) -> None:
    data = stream(kind, sharding=sharding)
    held = set(torch.nonzero(data.stream.held).flatten().tolist())
    for task in range(data.num_tasks):
        for y in range(6):
            members = (data.stream.train_parts == task) & (data.train_targets == y)
            count = int(members.sum())
            expected = min(max(round(0.3 * count), 1), count - 1) if count else 0
            assert int((members & data.stream.held).sum()) == expected
        assert not set(data.train_indices(task).tolist()) & held
    for size in (1, 3):
        met: list[list[int]] = [[] for _ in range(data.num_tasks)]
        for rank in range(size):
            data._place = lambda rank=rank, size=size: (rank, size)
            for task, loader in enumerate(data.test_loaders(data.num_tasks - 1)):
                for batch in loader:
                    met[task] += batch.sample_ids.tolist()
                    assert torch.equal(batch.inputs, data.train_inputs[batch.sample_ids])
                    assert torch.equal(batch.targets, data.train_targets[batch.sample_ids])
                    assert set(batch.targets.tolist()) <= set(data.stream.homes[task])
        assert sorted(row for rows in met for row in rows) == sorted(held)
        if kind != "blurry":
            assert [sorted(rows) for rows in met] == [data.stream.held_indices(t).tolist() for t in range(len(met))]


def rows_of_matrix(agent: Any, data: ContinualDataModule) -> list[float]:
    """Return the accuracy of the trained network on each task's hold-outs, by NumPy."""
    with torch.no_grad():
        guess = agent.eval()(data.train_inputs).argmax(1).numpy()
    held, hits = data.stream.held.numpy(), guess == data.train_targets.numpy()
    return [float(hits[held & np.isin(data.train_targets.numpy(), home)].mean()) for home in data.stream.homes]


@pytest.mark.parametrize("kind", ["class", "concatenated", "blurry"])
def test_the_matrix_and_test_are_of_the_hold_outs_and_the_report_says_so(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = stream(kind)
    agent = make_agent("base", data, epochs_per_task=3)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    by_hand = rows_of_matrix(agent, data)
    assert matrix(agent)[-1].tolist() == pytest.approx(by_hand)
    assert len(set(by_hand)) > 1 or kind == "concatenated"  # which learns all
    facts = json.loads((tmp_path / "report" / "accuracy_matrix.json").read_text())
    assert (facts["evaluated_on"], facts["selection"]) == ("held_out", "none")
    assert facts["matrix"][-1] == pytest.approx(by_hand)
    assert sum(facts["task_test_samples"]) == int(data.stream.held.sum())
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert "Accuracy in % on the held-out training samples of each task" in summary
    assert "test samples" not in summary
    assert "Accuracy in % on held-out training samples after 3 of 3 tasks" in capsys.readouterr().out
    (*found,) = make_trainer(tmp_path).test(agent, data, verbose=False)
    tested = {name: value for part in found for name, value in part.items()}
    assert [tested[f"test/acc_task_{t}"] for t in range(3)] == pytest.approx(by_hand)


def test_pictures_say_what_they_are_of() -> None:
    from dcl_lightning.metrics import AccuracyMatrix
    from dcl_lightning.report.figures import matrix_figure

    assert matrix_figure(AccuracyMatrix(2)).axes[0].get_xlabel() == "test samples of task"
    held_out = matrix_figure(AccuracyMatrix(2), SAMPLES["held_out"])
    assert held_out.axes[0].get_xlabel() == "held-out training samples of task"


class Recorder:
    """Keeps the ids of all samples that an agent's steps meet."""

    def __init__(self, agent: Any) -> None:
        self.met: set[int] = set()
        inner = agent.training_loss

        def training_loss(batch: Any) -> Any:
            self.met |= set(batch.sample_ids.tolist())
            return inner(batch)

        agent.training_loss = training_loss


@pytest.mark.parametrize("kind", ["class", "concatenated"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("er", {}),
        ("er", {"memory": {"update": "task_end", "buffer_size": 30}}),
        ("bic", {"held_out": 0.4}),
        ("icarl", {}),
        ("gdumb", {}),
    ],
)
def test_no_hold_out_is_trained_on_or_stored(name: str, options: dict, kind: str, tmp_path: Path) -> None:
    data = stream(kind, batch_size=7)
    agent = make(name, data, **options)
    seen = Recorder(agent)
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    held = set(torch.nonzero(data.stream.held).flatten().tolist())
    rows = agent.memory_rows() if name == "icarl" else agent.rehearsal.manager.memory_rows()
    stored = rows.sample_ids
    assert len(stored)
    assert not held & set(stored.tolist())
    if name != "gdumb":  # which trains on its memory alone
        assert seen.met == set(range(len(data.train_targets))) - held
    assert not held & seen.met
    assert torch.isfinite(matrix(agent)).sum() == 6


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"evaluate_on=held_out with data\.val_ratio=0: .*above 0"):
        make_data(evaluate_on="held_out")
    with pytest.raises(ConfigurationError, match=r"data\.evaluate_on='heldout'.*did you mean 'held_out'"):
        make_data(evaluate_on="heldout", val_ratio=0.1)


def test_selection_on_the_reported_hold_outs_is_refused(tmp_path: Path) -> None:
    def fit(folder: str, **kwargs: Any) -> str:
        data = make_data(**kwargs)
        stopper = EarlyStopping("val/acc", mode="max")
        make_trainer(tmp_path / folder, [stopper]).fit(make_agent("base", data), datamodule=data)
        return json.loads((tmp_path / folder / "report" / "accuracy_matrix.json").read_text())["selection"]

    with pytest.raises(ConfigurationError, match=r"select on the hold-outs that the report is of: .*evaluate_on=test"):
        fit("refused", **HELD, validate_on="held_out")
    with pytest.raises(ConfigurationError, match=r"nothing to validate on: give data\.evaluate_on=test, .*select_on"):
        fit("refused", **HELD)
    assert fit("knowingly", **HELD, select_on_test=True) == "held_out"
    assert fit("apart", val_ratio=0.3) == "validation"


class Watch(pl.Callback):
    """Counts validations, and notes the samples of the last one."""

    def __init__(self) -> None:
        self.count, self.batches = 0, []

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.count, self.batches = self.count + 1, []

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        self.batches.append(batch.sample_ids)


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({}, None),
        ({"validate_on": "test"}, "test"),
        ({"select_on_test": True}, "test"),
        ({"val_ratio": 0.3}, "held_out"),
        ({"val_ratio": 0.3, "validate_on": "held_out"}, "held_out"),
        ({"val_ratio": 0.3, "validate_on": "test"}, "test"),
        (HELD, None),
        ({**HELD, "select_on_test": True}, "held_out"),
        ({**HELD, "validate_on": "held_out"}, "held_out"),
        ({**HELD, "validate_on": "test"}, "test"),
    ],
)
def test_a_fit_validates_on_what_is_asked_for(tmp_path: Path, options: dict, validated: str | None) -> None:
    data, watch = make_data(**options), Watch()
    agent = make_agent("base", data)
    make_trainer(tmp_path, [watch], enable_checkpointing=False).fit(agent, datamodule=data)
    assert watch.count == (0 if validated is None else 6)  # epochs
    if validated is not None:
        held = torch.nonzero(data.stream.held).flatten()
        expected = held if validated == "held_out" else torch.arange(len(data.test_targets))
        assert torch.equal(torch.cat(watch.batches).sort().values, expected)
    assert torch.isfinite(matrix(agent)).sum() == 6
    # Asked for by a command of its own, there is always something.
    watch.count = 0
    make_trainer(tmp_path, [watch], enable_checkpointing=False).validate(agent, datamodule=data, verbose=False)
    assert watch.count == 1


@pytest.mark.parametrize("interval", [{"val_check_interval": 2}, {"check_val_every_n_epoch": 2}])
def test_intervals_of_a_validation_of_nothing_are_refused(tmp_path: Path, interval: dict) -> None:
    def fit(**kwargs: Any) -> None:
        data = make_data(**kwargs)
        make_trainer(tmp_path, **interval).fit(make_agent("base", data), datamodule=data)

    key = next(iter(interval))
    with pytest.raises(ConfigurationError, match=rf"trainer\.{key}=2 .*data\.val_ratio above 0 .*validate_on=test to"):
        fit()
    with pytest.raises(ConfigurationError, match=rf"trainer\.{key}=2 .*evaluate_on=test, .*validate_on=held_out to"):
        fit(**HELD)
    fit(validate_on="test")


def test_validation_on_hold_outs_that_there_are_none_of_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"validate_on=held_out with data\.val_ratio=0: .*validate_on=test"):
        make_data(validate_on="held_out")


def fitted(folder: Path, data: ContinualDataModule, kind: str = "base", **kwargs: Any) -> Any:
    agent = make_agent(kind, data, epochs_per_task=1)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(folder, [saver]).fit(agent, datamodule=data, **kwargs)
    return agent


@pytest.mark.parametrize("kind", ["base", "icarl"])
def test_a_resumed_run_has_the_same_figures_and_no_other_samples(kind: str, tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", make_data(**HELD), kind)
    for step in (2, 4):  # within a task, and at a task's end
        path = tmp_path / "whole" / f"step={step}.ckpt"
        again = fitted(tmp_path / f"again{step}", make_data(**HELD), kind, ckpt_path=path)
        assert torch.equal(weights(again), weights(whole))
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(whole).nan_to_num(-1))
    with pytest.raises(ConfigurationError, match="evaluate_on held_out, this one has test"):
        fitted(tmp_path / "refused", make_data(val_ratio=0.3), kind, ckpt_path=path)


def test_a_checkpoint_from_before_the_option_is_of_the_test_set(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", make_data(val_ratio=0.3))
    old = torch.load(tmp_path / "whole" / "step=3.ckpt", weights_only=True)
    del old["ContinualDataModule"]["stream"]["evaluate_on"]
    torch.save(old, tmp_path / "old.ckpt")
    again = fitted(tmp_path / "again", make_data(val_ratio=0.3), ckpt_path=tmp_path / "old.ckpt")
    assert torch.equal(matrix(again).nan_to_num(-1), matrix(whole).nan_to_num(-1))
    with pytest.raises(ConfigurationError, match="evaluate_on test, this one has held_out"):
        fitted(tmp_path / "refused", make_data(**HELD), ckpt_path=tmp_path / "old.ckpt")


def test_evaluation_is_of_the_runs_own_hold_outs(tmp_path: Path) -> None:
    agent = fitted(tmp_path, make_data(val_ratio=0.3, seed=3))
    data = agent.trainer.datamodule
    by_hand = rows_of_matrix(agent, data)

    def tested(other: ContinualDataModule) -> list[float]:
        trainer = make_trainer(tmp_path)
        found = trainer.test(make_agent("base", other), other, ckpt_path=tmp_path / "step=6.ckpt", verbose=False)
        values = {name: value for part in found for name, value in part.items()}
        return [values[f"test/acc_task_{t}"] for t in range(3)]

    # A run that reported on the test set, whose hold-outs are of its seed.
    assert tested(make_data(**HELD, seed=0)) == pytest.approx(by_hand)
    with pytest.raises(ConfigurationError, match=r"val_ratio 0\.3, this one has 0\.5"):
        tested(make_data(val_ratio=0.5, evaluate_on="held_out"))
    tested(make_data(val_ratio=0.5))  # on the test set


def test_a_task_without_hold_outs_is_left_empty(tmp_path: Path) -> None:
    x, y = torch.randn(9, 1, 4, 4), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    data = ContinualDataModule((x, y, x, y), increment=1, val_ratio=0.5, evaluate_on="held_out", batch_size=2)
    with pytest.warns(UserWarning, match=r"tasks without held-out samples: \[2\]; their accuracies are left empty"):
        data.setup()
    agent = make_agent("base", data, epochs_per_task=1)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    assert torch.isfinite(matrix(agent)).tolist() == [[True, False, False], [True, True, False], [True, True, False]]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("data: {init_args: {val_ratio: 0.1, evaluate_on: held_out, increment: 5}}\n")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert cli.main(["fit", "--config", "a.yaml", "--data.batch_size", "200", *quiet]) == 0
    folder = tmp_path / "runs" / "dcl" / "version_0"
    config = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    for command in ("validate", "test", "predict"):
        assert cli.main([command, *config]) == 0
    (file,) = tmp_path.rglob("predictions.csv")
    rows = [int(row[0]) for row in list(csv.reader(file.open()))[1:]]
    data = ContinualDataModule("digits", val_ratio=0.1, increment=5)
    data.setup()
    assert rows == torch.nonzero(data.stream.held).flatten().tolist()
    facts = json.loads((folder / "report" / "accuracy_matrix.json").read_text())
    assert facts["evaluated_on"] == "held_out"
    assert sum(facts["task_test_samples"]) == len(rows)


def test_two_workers_have_the_figures_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    assert_ended_well(run_workers(held_out_run, 2, tmp_path, "horovod", 3))
    held_out_run(tmp_path, "auto", 6)
    found: dict[str, Tensor] = {
        name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("horovod0", "horovod1", "auto0")
    }
    for name in ("horovod1", "auto0"):
        assert torch.equal(found[name].nan_to_num(-1), found["horovod0"].nan_to_num(-1)), found
    assert torch.isfinite(found["auto0"]).sum() == 6
    assert 0.2 < float(found["auto0"][2].mean()) < 0.95
