"""Runs of the command line: composed files, folders, callbacks, Lightning's monitors, loggers."""

from __future__ import annotations

import csv
import json
import re
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dcl_lightning import cli
from dcl_lightning.cli.run_dir import OwnFolders

ROOT = Path(__file__).parent.parent.parent
# A stream of two tasks of two steps each.
SMALL = ["fit", "--model.epochs_per_task", "1", "--data.increment", "5", "--trainer.limit_train_batches", "2"]
SMALL += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *args, "--print_config"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return yaml.safe_load(out)


def test_files_for_agent_data_and_trainer_compose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "top" / "parts").mkdir(parents=True)  # paths in a file are relative to it
    agent = {"class_path": "nil", "init_args": {"backbone": "mlp", "lr": 0.02, "epochs_per_task": 3}}
    data = {"class_path": "ContinualDataModule", "init_args": {"dataset": "digits", "increment": 5}}
    trainer = {"accelerator": "cpu", "limit_train_batches": 2}
    for name, part in {"nil": agent, "digits": data, "short": trainer}.items():
        (tmp_path / "top" / "parts" / f"{name}.yaml").write_text(yaml.safe_dump(part))
    names = {"model": "parts/nil.yaml", "data": "parts/digits.yaml", "trainer": "parts/short.yaml"}
    (tmp_path / "top" / "all.yaml").write_text(yaml.safe_dump(names))
    for key, part in {"model": agent, "data": data, "trainer": trainer}.items():
        (tmp_path / f"{key}.yaml").write_text(yaml.safe_dump({key: part}))
    # One file that names the parts, a file for each key, a part for each flag; what stands later wins.
    one = printed(["--config", "top/all.yaml", "--model.lr", "0.5"], capsys)
    three = [word for key in names for word in ("--config", f"{key}.yaml")]
    assert printed([*three, "--model.lr", "0.5"], capsys) == one
    flags = [word for key, path in names.items() for word in (f"--{key}", f"top/{path}")]
    assert printed([*flags, "--model.lr", "0.5"], capsys) == one
    init = one["model"]["init_args"]
    assert (init["lr"], init["epochs_per_task"], one["data"]["init_args"]["increment"]) == (0.5, 3, 5)
    assert one["trainer"]["limit_train_batches"] == 2
    regime = str(ROOT / "configs" / "regimes" / "cifar.yaml")
    init = printed(["--config", "top/all.yaml", "--config", regime], capsys)["model"]["init_args"]
    assert init["milestones"] == [81, 122, 164]


def claimed(folder: str, barrier, results) -> None:
    barrier.wait(60)
    logger = CSVLogger(folder, "study")
    OwnFolders([logger])
    results.put(logger.version)


def test_runs_started_together_have_a_folder_each(tmp_path: Path) -> None:
    context = get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=claimed, args=(str(tmp_path), barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == list(range(8))
    for process in processes:
        process.join()
    # Two loggers of one run share one; a version that the user chose is his.
    loggers = [CSVLogger(tmp_path, "study"), TensorBoardLogger(tmp_path, "study"), CSVLogger(tmp_path, "study", "mine")]
    OwnFolders(loggers)
    assert [logger.version for logger in loggers] == [8, 8, "mine"]


def test_monitors_of_lightning_and_the_default_checkpoint_beside_callbacks_of_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    (tmp_path / "c.yaml").write_text("trainer:\n  callbacks:\n    - {class_path: LearningRateMonitor}\n")
    args = [*SMALL, "--model", "nil", "--config", "c.yaml", "--trainer.callbacks+=DeviceStatsMonitor"]
    args += ["--trainer.callbacks.cpu_stats", "false", "--model.rehearsal.buffer_size", "40"]
    args += ["--data.validate_on", "test"]
    assert cli.main(args) == 0
    folder = tmp_path / "runs" / "dcl" / "version_0"
    header = next(csv.reader((folder / "metrics.csv").open()))
    names = {"train/loss", "train/acc", "val/loss", "val/acc", "val/acc_task_0", "val/acc_task_1", "task"}
    names |= {"cl/average_accuracy", "cl/forgetting", "cl/backward_transfer"}
    names |= {"buffer/fill", "buffer/bytes", "buffer/wait_ms", "buffer/staleness", "lr-SGD", "throughput/samples_per_s"}
    assert names <= set(header), names - set(header)
    assert (folder / "checkpoints" / "last.ckpt").exists()
    kept = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert [c["class_path"].rpartition(".")[2] for c in kept] == ["LearningRateMonitor", "DeviceStatsMonitor"]
    with (folder / "metrics.csv").open() as file:
        num_bytes = max(float(row["buffer/bytes"]) for row in csv.DictReader(file) if row["buffer/bytes"])
    assert f"Memory: room for 40 rows, {int(num_bytes):,} bytes" in caplog.text
    assert re.search(r"Network: \w+, [1-9][\d,]* trained parameters$", caplog.text, re.MULTILINE)


def test_the_seed_of_a_run_is_in_its_files(tmp_path: Path) -> None:
    assert cli.main([*SMALL, "--seed_everything", "7"]) == 0
    folder = tmp_path / "runs" / "dcl" / "version_0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == 7
    assert json.loads((folder / "report" / "accuracy_matrix.json").read_text())["seed"] == 7


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def tags_of(folder: Path) -> set[str]:
    tags = events(folder).Tags()
    return {*tags["scalars"], *tags["images"]}


def test_tensorboard_beside_csv_has_the_same_names_and_the_matrix_as_a_picture(tmp_path: Path) -> None:
    loggers = [
        {"class_path": name, "init_args": {"save_dir": "runs", "name": "both"}}
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    (tmp_path / "l.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    assert cli.main([*SMALL, "--config", "l.yaml", "--data.validate_on", "test"]) == 0
    folder = tmp_path / "runs" / "both" / "version_0"
    header = {*next(csv.reader((folder / "metrics.csv").open()))} - {"step"}
    tags = tags_of(folder)
    assert header <= tags, header - tags
    assert {"val/acc", "val/acc_task_1", "cl/average_accuracy", "train/loss", "cl/accuracy_matrix"} <= tags
    assert not (tmp_path / "runs" / "both" / "version_1").exists()
    found = events(folder)
    report = json.loads((folder / "report" / "accuracy_matrix.json").read_text())
    over_tasks = [(event.step, event.value) for event in found.Scalars("cl/average_accuracy_over_tasks")]
    first, second = (np.nanmean(np.array(row, dtype=float)) for row in report["matrix"])
    assert over_tasks == [(0, pytest.approx(first)), (1, pytest.approx(second))]
    assert found.Scalars("hp_metric")[-1].value == pytest.approx(report["average_accuracy"])


def test_selection_within_each_task_on_hold_outs_and_none_on_test_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaders become more with each task, ``val/acc`` stays; what was best in one task is forgotten in the next."""
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc", "mode": "max", "patience": 1}}
    stop["init_args"]["min_delta"] = 1.0  # nothing is that much better: each task stops at its second epoch
    save = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/acc", "mode": "max", "filename": "{epoch}"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stop, save]}}))
    args = [*SMALL, "--data.increment", "4", "--model.epochs_per_task", "5", "--config", "s.yaml"]
    assert cli.main(args) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "there is nothing to validate on" in error
    assert "data.val_ratio" in error
    assert not list(tmp_path.rglob("*.ckpt"))
    assert cli.main([*args, "--data.val_ratio", "0.2"]) == 0
    (report,) = tmp_path.rglob("accuracy_matrix.json")
    facts = json.loads(report.read_text())
    assert facts["selection"] == "validation"
    assert facts["optimizer_steps"] == 3 * 2 * 2  # tasks, epochs, steps
    saved = sorted(int(path.stem.partition("=")[2].split("-")[0]) for path in tmp_path.rglob("epoch=*.ckpt"))
    assert [epoch // 2 for epoch in saved] == [0, 1, 2]


@pytest.mark.exhaustive  # neither is among the packages that the set-up installs
@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_loggers_that_keep_runs_in_one_folder_leave_each_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("wandb" if name == "WandbLogger" else "mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for _ in range(2):
        assert cli.main([*SMALL, "--trainer.logger", name, "--trainer.logger.save_dir", "kept"]) == 0
        if name == "WandbLogger":
            module.finish()  # as the end of the process does
    reports = [*tmp_path.rglob("accuracy_matrix.json")]
    assert len(reports) == 2
    for report in reports:
        assert (report.parent.parent / "config.yaml").is_file()
        assert (report.parent.parent / "checkpoints" / "last.ckpt").is_file()
