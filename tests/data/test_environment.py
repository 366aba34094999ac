"""Surroundings of a fit: daemonic, spawned and threaded processes, names and seeds of any kind."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest

from dcl_lightning import cli
from dcl_lightning.agents import FineTuning
from dcl_lightning.backbones import MLP
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.memory.config import RehearsalConfig
from tests.data import small_sets

FIT = ["fit", "--model", "nil", "--model.epochs_per_task", "1", "--trainer.accelerator", "cpu"]
FIT += ["--trainer.enable_progress_bar", "false", "--trainer.limit_train_batches", "1"]
FOLDER = ["--data.dataset=folder", "--data.increment=1", "--data.num_workers=0", '--data.source_options={"size": 16}']


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def fit_of_images(root: str, num_workers: int | None, steps: Any = None) -> int:
    data = ContinualDataModule(
        "folder", root=root, increment=1, num_workers=num_workers, batch_size=2, source_options={"size": 16}
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root,
    )  # fmt: skip
    trainer.fit(FineTuning(MLP([4]), 2, data.input_spec), data)
    if steps is not None:
        steps.value = trainer.global_step
    return trainer.global_step


def test_images_are_read_in_a_daemonic_process(tmp_path: Path) -> None:
    """Such a process, of a pool for instance, may not start others: it reads images itself."""
    root = small_sets.class_folders(tmp_path / "pictures", "train", "test", ["cat", "dog"], count=4)
    context = multiprocessing.get_context("spawn")
    steps = context.Value("i", 0)
    process = context.Process(target=fit_of_images, args=(str(root), 2, steps), daemon=True)
    process.start()
    process.join(300)
    assert (process.exitcode, steps.value) == (0, 4)


def test_a_fit_in_a_thread(tmp_path: Path) -> None:
    root = small_sets.class_folders(tmp_path / "pictures", "train", "test", ["cat", "dog"], count=4)
    steps: list[int] = []
    thread = threading.Thread(target=lambda: steps.append(fit_of_images(str(root), 0)))
    thread.start()
    thread.join()
    assert steps == [4]


STRANGE = os.fsdecode(b"\xe9t\xe9")


def test_classes_and_images_whose_names_are_not_utf_8(tmp_path: Path) -> None:
    """The report comes after the training, and must not fail there."""
    root = small_sets.class_folders(tmp_path, "train", "test", ["cat", STRANGE], count=2)
    (root / "train" / "cat" / "cat_0.JPEG").rename(root / "train" / "cat" / f"{STRANGE}.JPEG")
    assert cli.main([*FIT, *FOLDER, f"--data.root={root}"]) == 0
    report = tmp_path / "runs/dcl/version_0/report"
    assert json.loads((report / "accuracy_matrix.json").read_text())["task_classes"] == [["\\xe9t\\xe9"], ["cat"]]
    assert (report / "summary.md").is_file()


def test_a_root_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    root = small_sets.class_folders(tmp_path / STRANGE, "train", "test", ["cat", "dog"], count=4)
    assert fit_of_images(str(root), 0) == 4
    assert (root / "report/summary.md").is_file()


def test_arguments_that_are_not_utf_8_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*FIT, "--data.dataset=digits", f"--data.root=/{STRANGE}"]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "--data.root=" in error
    assert "give a symbolic link" in error


LONG_NAME, LONG_PATH = "x" * 300, "/tmp" + "/y" * 3000


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.dataset=digits", f"--trainer.logger.save_dir={LONG_NAME}"],
        ["--data.dataset=digits", f"--trainer.logger.save_dir={LONG_PATH}"],
        ["--data.dataset=digits", f"--trainer.logger.name={LONG_NAME}"],
        ["--data.dataset=digits", "--trainer.logger=false", f"--trainer.default_root_dir={LONG_NAME}"],
        ["--data.dataset=digits", "--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.dirpath={LONG_NAME}"],
        [*FOLDER, f"--data.root={LONG_NAME}"],
        [*FOLDER, f"--data.root={LONG_PATH}"],
    ],
    ids=lambda flags: flags[-1].partition("=")[0],
)
def test_paths_that_are_too_long_are_refused_in_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main([*FIT, *flags])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**70, 1.0, True, "1", float("nan")])
def test_seeds_out_of_range_are_refused_before_anything_else(seed: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.seed=.*whole number of at least 0, below 4294967296"):
        ContinualDataModule("digits", seed=seed)
    with pytest.raises(ConfigurationError, match=r"rehearsal\.seed=.*whole number of at least 0, below 4294967296"):
        RehearsalConfig(seed=seed)
    if not isinstance(seed, str):
        with pytest.raises(ConfigurationError, match=r"class_order"):
            ContinualDataModule("digits", class_order=seed).setup()
    if seed in (-1, 1.0) or seed != seed:
        with pytest.raises(ConfigurationError, match=r"data\.source_options\.seed"):
            ContinualDataModule("synthetic", source_options={"seed": seed})


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(7), np.uint8(7)])
def test_seeds_of_any_integer_type_train(seed: Any) -> None:
    options = {"per_class": 4, "size": 8, "seed": seed}
    data = ContinualDataModule("synthetic", seed=seed, class_order=seed, val_ratio=0.5, source_options=options)
    data.setup()
    assert data.seed == int(seed)
    assert len(data.prepare_batch(next(iter(data.train_dataloader())), train=True, epoch=0).inputs) == 4
    assert RehearsalConfig(seed=seed).seed == seed


@pytest.mark.parametrize("seed", ["-1", "4294967296", "18446744073709551616"])
def test_seed_everything_out_of_range_is_refused_in_one_line(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*FIT, "--data.dataset=digits", "--seed_everything", seed]) == 2
    assert capsys.readouterr().err.startswith(f"error: seed_everything={seed}: give a whole number of at least 0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["-1", "x", str(2**32)])
def test_seed_in_the_environment_that_cannot_be(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    with pytest.raises(ConfigurationError, match="PL_GLOBAL_SEED="):
        ContinualDataModule("digits")
