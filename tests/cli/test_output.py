"""Output never ends a run, whatever the terminal or encoding; nothing is written unasked."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dcl_lightning import ContinualDataModule, FineTuning, cli
from dcl_lightning.backbones import MLP
from dcl_lightning.screen import Screen, log_through, show, tolerant

SMALL = ["fit", "--data.dataset=synthetic", "--data.increment=5", "--trainer.accelerator=cpu"]
SMALL += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Bare:
    """As much of a stream as some programs put in the place of stdout."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Broken(Bare):
    def write(self, text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def of(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def fitted() -> pl.Trainer:
    data = ContinualDataModule("synthetic", increment=5)
    agent = FineTuning(MLP([8]), data.num_classes, data.input_spec)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, limit_train_batches=1, limit_val_batches=0,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(agent, datamodule=data)
    return trainer


@pytest.mark.parametrize(
    "stream", [Bare(), Broken(), None, closed(), of("ascii"), of("latin-1"), object()], ids=lambda s: type(s).__name__
)
def test_in_python_a_fit_does_not_depend_on_stdout(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    trainer = fitted()
    monkeypatch.undo()
    assert trainer.global_step == 2
    if isinstance(stream, Bare) and not isinstance(stream, Broken):
        assert "task 1 (2 of 2) · 1 epoch of" in stream.text
    if isinstance(stream, io.TextIOWrapper):
        stream.seek(0)
        assert ("task 1 (2 of 2) ? 1" if stream.encoding == "ascii" else "task 1 (2 of 2) · 1") in stream.read()


@pytest.mark.parametrize(
    "redirection",
    [
        "| head -n 1",
        *(pytest.param(words, marks=pytest.mark.exhaustive) for words in (">&- 2>&-", "> /dev/full 2>&1", ">&-")),
    ],
)
def test_on_the_command_line_a_run_ends_well(redirection: str, tmp_path: Path) -> None:
    command = " ".join([sys.executable, "-m", "dcl_lightning", *SMALL, "--trainer.enable_progress_bar=true"])
    script = f"PYTHONIOENCODING=ascii {command} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (folder,) = (tmp_path / "runs" / "dcl").iterdir()
    assert (folder / "report" / "summary.md").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_a_screen_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Bare()
    monkeypatch.setattr(sys, "stdout", bare)
    with tolerant("stdout"):
        print("one", flush=True)
        assert isinstance(sys.stdout, Screen)
    assert sys.stdout is bare
    show("two")
    assert bare.text == "one\ntwo\n"
    assert not Screen(bare).isatty()
    assert not Screen(None).isatty()
    assert Screen(closed()).write("three") == 5


def test_logs_to_a_terminal_go_through_another_stream_and_back_again() -> None:
    terminal, file, other = Bare(), Bare(), Bare()
    terminal.isatty = lambda: True
    handlers = [logging.StreamHandler(terminal), logging.StreamHandler(file)]
    logger = logging.getLogger("test_logs_to_a_terminal")
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    undo = log_through(other, ["nobody", logger.name])
    logger.warning("one")
    undo()
    logger.warning("two")
    assert (terminal.text, file.text, other.text) == ("two\n", "one\ntwo\n", "one\n")


@pytest.mark.parametrize("in_a_job", [False, True])
def test_lightnings_advice_to_use_srun_is_for_slurms_jobs(
    in_a_job: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    if in_a_job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert cli.main([*SMALL, "--trainer.fast_dev_run=1"]) == 0
    assert any("`srun`" in str(warning.message) for warning in found) == in_a_job


# -- nothing that is not to be written -----------------------------------------------------------------


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    assert cli.main([*SMALL, "--model=nil", "--trainer.fast_dev_run=1"]) == 0
    saver = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    assert cli.main([*SMALL, "--trainer.fast_dev_run=true", *saver]) == 0
    predict = [arg for arg in SMALL[1:] if "limit" not in arg]
    assert cli.main(["predict", "--model=base", *predict, "--trainer.fast_dev_run=true"]) == 0
    assert everything(tmp_path) == set()


def test_a_checkpoint_callback_that_saw_a_trial_run_is_as_before(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    data = ContinualDataModule("synthetic", increment=5)
    agent = FineTuning(MLP([8]), data.num_classes, data.input_spec)
    pl.Trainer(accelerator="cpu", fast_dev_run=1, callbacks=[saver]).fit(agent, datamodule=data)
    assert saver.save_last is True
    assert everything(tmp_path) == set()


@pytest.mark.parametrize(
    "refused",
    [
        ["--trainer.max_epochs=77"],
        ["--model=icarl", "--model.rehearsal.buffer_size=1"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/acc"],
        ["--ckpt_path=nowhere.ckpt"],
        ["--trainer.profiler=simple", "--trainer.max_epochs=77"],
        ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs", "--trainer.max_epochs=77"],
        ["--trainer.logger.version=mine", "--trainer.max_epochs=77"],
    ],
    ids=" ".join,
)
def test_a_refused_run_leaves_nothing_and_keeps_what_was_there(refused: list[str], tmp_path: Path) -> None:
    assert cli.main([*SMALL, *refused]) == 2
    assert everything(tmp_path) == set()
    assert tmp_path.is_dir()
    (tmp_path / "runs" / "dcl" / "version_0").mkdir(parents=True)
    before = everything(tmp_path)
    assert cli.main([*SMALL, *refused]) == 2
    assert everything(tmp_path) == before


def test_runs_without_a_logger_have_a_report_each(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {logger: false}\n")  # the user's own
    for seed in range(2):
        assert cli.main([*SMALL, "--config=config.yaml", f"--seed_everything={seed}"]) == 0
    assert (tmp_path / "config.yaml").read_text() == "trainer: {logger: false}\n"
    for number in (1, 2):
        folder = tmp_path / f"version_{number}"
        assert (folder / "report" / "summary.md").is_file()
        assert f"seed_everything: {number - 1}" in (folder / "config.yaml").read_text()
    assert not (tmp_path / "version_3").exists()


def test_a_trainer_that_fits_again_keeps_its_first_report(tmp_path: Path) -> None:
    trainer = fitted()
    data = ContinualDataModule("synthetic", increment=5)
    first = (tmp_path / "report" / "accuracy_matrix.json").read_text()
    trainer.fit(FineTuning(MLP([8]), data.num_classes, data.input_spec), datamodule=data)
    assert (tmp_path / "report" / "accuracy_matrix.json").read_text() == first
    assert (tmp_path / "version_1" / "report" / "accuracy_matrix.json").is_file()


# -- what is missing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.logger=WandbLogger"], ["wandb", "pip install"]),
        (["--trainer.logger=NeptuneLogger"], ["neptune"]),
        (["--trainer.logger=CometLogger"], ["comet"]),
        (["--trainer.logger=MLFlowLogger"], ["mlflow"]),
        (["--trainer.strategy=deepspeed"], ["deepspeed"]),
        (["--trainer.plugins=BitsandbytesPrecision", "--trainer.plugins.mode=nf4"], ["bitsandbytes"]),
        (["--trainer.accelerator=tpu"], ["torch_xla"]),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.mode=best"], ["mode"]),
        (["--trainer.precision=8"], ["precision"]),
        (["--trainer.devices=none"], ["devices"]),
        (["--trainer.profiler=slow"], ["profiler"]),
        (["--trainer.gradient_clip_val=1", "--trainer.gradient_clip_algorithm=x"], ["gradient_clip_algorithm"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_what_is_missing_or_wrong_is_one_line_before_anything_is_made(
    args: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(_installed(word) for word in words[:1]):
        pytest.skip(f"{words[0]} is installed")
    try:
        code = cli.main([*SMALL, *args])
    except SystemExit as end:
        code = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert all(word in lines[0].lower() for word in words), lines[0]
    assert everything(tmp_path) == set()


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_best_checkpoint_of_no_fit_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--model=base", "--data.dataset=synthetic", "--ckpt_path=best"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "ckpt_path=best" in line
    assert everything(tmp_path) == set()
