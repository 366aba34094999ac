"""Paths below ``~`` and relative paths in a process that changes its working directory."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

from dcl_lightning import cli
from dcl_lightning.agents import FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.callbacks import PredictionWriter
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.sources.cache import VARIABLE
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.paths import absolute, expanded
from tests.data import small_sets

FIT = ["--data.dataset", "digits", "--data.increment", "5", "--model.epochs_per_task", "1"]
FIT += ["--trainer.limit_train_batches", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home folder; the process works in another one, and no ``~`` may appear there."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "home"


def test_tilde_is_the_home_folder_and_nothing_else_changes(home: Path) -> None:
    values = {"a": ["~/x", "--out=~/y", 3], "b": {"c": "x/~", "d": None}}
    assert expanded(values) == {"a": [f"{home}/x", f"--out={home}/y", 3], "b": {"c": "x/~", "d": None}}
    assert absolute("~/x/../y") == f"{home}/y"
    assert absolute(Path("z")) == os.path.join(os.getcwd(), "z")
    assert absolute("s3://bucket/~x") == "s3://bucket/~x"


def test_command_line_and_configuration_files_expand_every_path(home: Path) -> None:
    config = {
        "trainer": {
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "~/runs", "name": "x"}},
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "~/kept", "save_last": True}}],
        }
    }
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config=~/run.yaml", "--model", "nil", *FIT]) == 0
    assert (home / "runs/x/version_0/report/summary.md").is_file()
    assert (home / "kept/last.ckpt").is_file()
    found = ["test", "--config=~/run.yaml", "--model=nil", "--data.increment=5", "--ckpt_path=~/kept/last.ckpt"]
    assert cli.main([*found, "--trainer.logger=false", "--trainer.default_root_dir=~/out"]) == 0
    assert (home / "out/config.yaml").is_file()
    assert cli.main(["compare", "~/runs/x", "--out=~/comparison"]) == 0
    assert (home / "comparison/comparison.csv").is_file()
    assert not os.listdir(".")


def test_default_root_dir_and_data_root_on_the_command_line(home: Path) -> None:
    small_sets.class_folders(home / "pictures", "train", "test", ["cat", "dog"], count=2)
    flags = ["--data.dataset=folder", "--data.root=~/pictures", '--data.source_options={"size": 16}']
    flags += ["--data.increment=1", "--data.num_workers=0"]
    flags += ["--trainer.logger=false", "--trainer.default_root_dir=~/out"]
    assert cli.main(["fit", *FIT, *flags]) == 0
    assert (home / "out/report/summary.md").is_file()
    assert not os.listdir(".")


def test_data_module_expands_root_copy_and_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_sets.cifar(home / "sets", 10)
    monkeypatch.setenv(VARIABLE, "~/cache")
    data = ContinualDataModule("cifar10", root="~/sets", stage_to="~/copy")
    data.prepare_data()
    data.setup()
    assert len(data.train_targets) == 100
    assert list((home / "copy").glob("cifar10-*"))
    assert list((home / "cache").glob("cifar10-*"))
    assert not os.listdir(".")


def test_checkpoints_and_predictions_in_python(home: Path) -> None:
    def trainer() -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, default_root_dir="~/runs",
            limit_train_batches=1, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[PredictionWriter("~/predictions")],
        )  # fmt: skip

    data = ContinualDataModule("digits", increment=5)
    agent = FineTuning(MLP([8]), 10, data.input_spec, epochs_per_task=1)
    first = trainer()
    first.fit(agent, data)
    first.save_checkpoint("~/kept/x.ckpt")
    assert (home / "kept/x.ckpt").is_file()
    trainer().fit(agent, data, ckpt_path="~/kept/x.ckpt")
    trainer().predict(agent, data, ckpt_path="~/kept/x.ckpt", return_predictions=False)
    assert (home / "predictions/predictions.csv").is_file()
    assert not os.listdir(".")


def test_relative_root_is_that_of_the_folder_in_which_the_data_module_was_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sets.class_folders(tmp_path / "here" / "pictures", "train", "test", ["cat", "dog"], count=2)
    data = ContinualDataModule("folder", root="pictures", increment=1, num_workers=0, source_options={"size": 16})
    monkeypatch.chdir(home)
    data.prepare_data()
    data.setup()
    monkeypatch.chdir(tmp_path)
    assert [len(batch.targets) for batch in data.train_dataloader()] == [2]


def test_a_working_folder_that_was_removed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").rmdir()
    with pytest.raises(ConfigurationError, match=r"x is relative to the working folder, which has been removed"):
        absolute("x")
    assert cli.main(["fit", "--data.dataset", "digits"]) == 2
    assert "which has been removed: change to another folder" in capsys.readouterr().err
