"""Faults of checkpoints: each gives one clear line, and the last good state stays usable."""

from __future__ import annotations

import os
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import Strategy
from PIL import Image

from dcl_lightning import cli
from dcl_lightning.backbones import MLP
from dcl_lightning.checkpoint.directory import latest_checkpoint, problem_of
from dcl_lightning.errors import CheckpointError, ConfigurationError, DataError
from tests.conformance.rehearsal_runs import assert_same_run, fit
from tests.conformance.small_stream import make_agent, make_data, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def every_step(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", **kwargs)


# -- damage ------------------------------------------------------------------------------------------


def damage(path: Path, other: Path, draw: random.Random) -> str:
    """Do one harm to a checkpoint or its side file; return which."""
    (side,) = Path(f"{path}.memory").glob("*/rank_0")
    (foreign,) = Path(f"{other}.memory").glob("*/rank_0")
    kind = draw.choice(["cut", "flip", "cut side", "flip side", "swap side", "no side", "empty", "other's side"])
    target = side if "side" in kind else path
    if kind.startswith("cut"):
        os.truncate(target, draw.randrange(1, target.stat().st_size))
    elif kind.startswith("flip"):
        content = bytearray(target.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no side":
        shutil.rmtree(side.parent)
    elif kind == "swap side":
        keep = side.read_bytes()
        side.write_bytes(foreign.read_bytes())
        foreign.write_bytes(keep)
    else:
        shutil.copy(foreign, side)
    return kind


def refused(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Damage copies of a checkpoint; each must be refused in one line, by ``last`` and by a fit."""
    fit(folder, callbacks=[every_step(folder / "good")], trainer={"max_steps": 9})
    draw, kinds = random.Random(seed), dict[str, int]()
    for number in range(count):
        place = folder / "bad"
        shutil.copytree(folder / "good", place)
        path, other = place / f"step={draw.randrange(5, 9)}.ckpt", place / "step=9.ckpt"
        kind = damage(path, other, draw)
        kinds[kind] = kinds.get(kind, 0) + 1
        problem = problem_of(path)
        assert problem, kind
        assert len(problem.splitlines()) == 1
        if number % 10 == 0 or kind not in kinds:
            with pytest.raises(CheckpointError) as failed:
                fit(folder, ckpt=path)
            assert len(str(failed.value).splitlines()) == 1
        shutil.rmtree(place)
    return kinds


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    kinds = refused(tmp_path, 40, seed=0)
    assert len(kinds) == 8, kinds


@pytest.mark.exhaustive
def test_a_hundred_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    kinds = refused(tmp_path, 100, seed=1)
    print(f"refused: {kinds}")
    assert sum(kinds.values()) == 100


def test_what_is_no_checkpoint_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("not a checkpoint at all, though it is long enough to look like one " * 9)
    for name, word in (("text.ckpt", "is damaged"), ("none.ckpt", "No such file"), ("", "directory")):
        with pytest.raises(CheckpointError, match=word):
            fit(tmp_path, ckpt=tmp_path / name)


# -- the disk ----------------------------------------------------------------------------------------


class FullDisk(pl.Callback):
    """From step 8 on no file grows beyond a size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [3_000, 10_000])
def test_a_full_disk_leaves_the_last_good_state(tmp_path: Path, size: int) -> None:
    """The memory's file does not fit, or it does and the checkpoint does not."""
    folder = tmp_path / "c"
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last=True, filename="{step}")
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written \(File too large\): what was saved before"):
            fit(tmp_path, callbacks=[FullDisk(size), saver])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".memory") == ["last.ckpt", "step=7.ckpt"]
    assert len(list(folder.glob("*.memory/*/rank_0"))) == 2
    path, problems = latest_checkpoint(folder.glob("*.ckpt"))
    assert not problems
    whole = fit(tmp_path)
    assert_same_run(fit(tmp_path, ckpt=path), (whole[0], whole[1][7:]))


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[Any] = []
    for folder in (tmp_path / "file" / "c", Path("/proc/c")):
        with pytest.raises(CheckpointError, match="checkpoints cannot be saved in"):
            fit(tmp_path, callbacks=[ModelCheckpoint(folder)], look=lambda *args: seen.append(args))
    if os.geteuid():
        (tmp_path / "read").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "read" / "c")])
    assert not seen


def test_two_jobs_do_not_save_in_one_folder(tmp_path: Path) -> None:
    class Another(pl.Callback):
        def on_train_start(self, trainer, module):
            with pytest.raises(CheckpointError, match=rf"another job \(process {os.getpid()} on .*\) saves"):
                fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "c")])
            # Without checkpoints it may run.
            fit(tmp_path, trainer={"max_steps": 2})

    fit(tmp_path, callbacks=[Another(), ModelCheckpoint(tmp_path / "c")], trainer={"max_steps": 3})
    # And one after the other, also after a failure.
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "c")], look=lambda *args: 1 / 0)
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "c")], trainer={"max_steps": 3})


# -- training ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path: Path) -> None:
    class Poison(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 7:
                module.head.weight.grad.fill_(float("inf"))

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    # Step 8 had a finite loss, and made weights that have none.
    with pytest.raises(DataError, match=r"the network after step 8 \(task 1, epoch 2\) is not finite"):
        fit(tmp_path, callbacks=[Poison(), saver])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 7
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())
    with pytest.raises(DataError, match=r"the loss of step 9 \(task 1, epoch 2\) is not finite"):
        fit(tmp_path, callbacks=[Poison()])


# -- another configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"agent": {"lr": 0.1}}, r"model.lr=0.1: the checkpoint's run had 0.05"),
        ({"agent": {"epochs_per_task": 3}}, r"model.epochs_per_task=3: the checkpoint's run had 2"),
        ({"data": {"class_order": [1, 0, 2, 3, 4, 5]}}, r"class_order \[0, 1, .*, this one has \[1, 0"),
        ({"data": {"increment": 3}}, r"\[\[0, 1\], .*\[\[0, 1, 2\]"),
        ({"buffer_size": 8}, r"rehearsal.buffer_size=8: the checkpoint's run had 12"),
        ({"policy": "fifo"}, r"rehearsal.policy=fifo: the checkpoint's run had nil"),
        ({"num_samples": 5}, r"rehearsal.num_samples=5: the checkpoint's run had 3"),
        ({"backbone": [9]}, r"backbone.*of \[8, 16\], this one of \[9, 16\]"),
        ({"backbone": [8, 8]}, r"tensors, backbone.* are in this network alone"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], trainer={"max_steps": 8})
    data = make_data(**change.pop("data", {}))
    width = change.pop("backbone", None)
    if width is None:
        with pytest.raises(ConfigurationError, match=told):
            fit(tmp_path, data=data, ckpt=tmp_path / "last.ckpt", **change)
        return
    from tests.conformance.rehearsal_runs import make_nil

    agent = make_nil(data)
    other = type(agent)(MLP(width), 6, agent.rehearsal.config, epochs_per_task=2, lr=0.05, momentum=0.9,
                        input_spec=data.input_spec)  # fmt: skip
    with pytest.raises(ConfigurationError, match=told):
        make_trainer(tmp_path).fit(other, datamodule=data, ckpt_path=tmp_path / "last.ckpt")


def test_another_agent_is_refused_and_harmless_values_are_taken(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], trainer={"max_steps": 8})
    data = make_data()
    with pytest.raises(ConfigurationError, match="had the agent NIL, this one has FineTuning"):
        make_trainer(tmp_path).fit(make_agent("base", data), datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    saver = every_step(tmp_path / "c")
    whole = fit(tmp_path, callbacks=[saver])
    other = fit(tmp_path, ckpt=tmp_path / "c" / "step=8.ckpt", execution="blocking", storage=str(tmp_path / "m"))
    assert_same_run(other, (whole[0], whole[1][8:]))


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 8:
            raise RuntimeError("no such luck")


@pytest.mark.parametrize("execution", ["blocking", "inline"])
def test_a_run_goes_on_from_what_was_saved_when_it_failed(execution: str, tmp_path: Path) -> None:
    """The failed step was taken, and the memory has had its batch."""
    whole = fit(tmp_path, execution=execution)
    with pytest.raises(RuntimeError, match="no such luck"):
        fit(tmp_path, callbacks=[Fails(), OnExceptionCheckpoint(tmp_path, "failed")], execution=execution)
    resumed = fit(tmp_path, ckpt=tmp_path / "failed.ckpt", execution=execution)
    assert_same_run(resumed, (whole[0], whole[1][8:]))


def test_the_data_set_gone_at_resume_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for y in range(4):
            (tmp_path / "d" / split / f"class{y}").mkdir(parents=True)
            for i in range(6):
                pixels = np.full((8, 8, 3), 40 * y + i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "d" / split / f"class{y}" / f"{i}.png")
    args = ["fit", "--model", "nil", "--data.dataset", "folder", "--data.root", str(tmp_path / "d"), "--data.increment"]
    args += ["2", "--data.batch_size", "4", "--data.num_workers", "0", "--data.source_options", "{size: 8}"]
    args += ["--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert cli.main(args) == 0
    (tmp_path / "d").rename(tmp_path / "gone")
    capsys.readouterr()
    assert cli.main([*args, "--ckpt_path", "last"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"data set 'folder' not found in {tmp_path / 'd'}" in errors[0]
    assert problem_of(tmp_path / "checkpoints" / "last.ckpt") == ""


# -- the command line ----------------------------------------------------------------------------------


def test_last_finds_the_newest_whole_checkpoint_and_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--model", "nil", "--model.epochs_per_task", "1", "--data.increment", "5", "--data.batch_size"]
    args += ["32", "--model.rehearsal.num_samples", "8", "--trainer.limit_val_batches", "0"]
    args += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=10"]
    args += ["--trainer.callbacks.save_last=true"]
    last = [*args, "--ckpt_path", "last"]
    assert cli.main(last) == 2
    assert "ckpt_path=last: no checkpoint in runs/dcl/*/checkpoints: leave --ckpt_path out" in capsys.readouterr().err
    stop = ["--trainer.max_steps", "34"]
    assert cli.main([*args, *stop]) == 0
    assert cli.main([*args, *stop]) == 0
    root = tmp_path / "runs" / "dcl"
    # Of the newer version nothing is whole: the one before goes on.
    for file in (root / "version_1" / "checkpoints").glob("*.ckpt"):
        os.truncate(file, 1000)
    assert cli.main(last) == 0
    assert sorted(p.name for p in root.iterdir()) == ["version_0", "version_1"]
    ended = torch.load(root / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    first = (root / "version_0" / "metrics_before_1.csv").read_text().splitlines()
    assert len(first) > 1
    steps = [line.split(",")[first[0].split(",").index("step")] for line in first[1:]]
    assert max(map(int, steps)) < 34 < 40 == ended["global_step"]
    # A finished run has nothing to do, and reports again.
    shutil.rmtree(root / "version_0" / "report")
    assert cli.main(last) == 0
    assert (root / "version_0" / "report" / "summary.md").exists()
    assert cli.main(["test", "--model", "nil", "--data.increment", "5", "--ckpt_path", "last"]) == 0
    capsys.readouterr()
    assert cli.main([*args, "--ckpt_path", str(root / "version_1" / "checkpoints" / "last.ckpt")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if "error:" in line]) == 1
    assert "is damaged" in errors[-1]


@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize("dirpath", [None, "kept"])
def test_last_finds_checkpoints_in_folders_that_metric_names_make(
    dirpath: str | None, insert: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--model", "nil", "--model.epochs_per_task", "2", "--data.increment", "5", "--data.batch_size", "32"]
    args += ["--data.select_on_test", "true", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    args += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/acc"]
    args += ["--trainer.callbacks.save_top_k=2", "--trainer.callbacks.mode=max"]
    name = "{epoch}-{val/acc:.2f}" if insert else "a/{epoch}-{val/acc:.2f}"
    args += [f"--trainer.callbacks.filename={name}", f"--trainer.callbacks.auto_insert_metric_name={insert}"]
    args += [f"--trainer.callbacks.dirpath={dirpath}"] if dirpath else []
    assert cli.main([*args, "--trainer.max_steps", "6"]) == 0
    folder = tmp_path / (dirpath or "runs/dcl/version_0/checkpoints")
    saved = {path.resolve() for path in folder.rglob("*.ckpt")}
    assert saved
    assert not list(folder.glob("*.ckpt"))
    if dirpath:  # another run's, newer, below the folder that the user has named
        shutil.copytree(next(iter(saved)).parent, folder / "other" / "checkpoints")
        for path in (folder / "other").rglob("*.ckpt"):
            os.utime(path, (2e9, 2e9))

    found: list[Path] = []

    def spy(trainer: Any, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        found.append(Path(checkpoint_path))
        return inner(trainer, checkpoint_path, *args, **kwargs)

    inner = Strategy.load_checkpoint
    monkeypatch.setattr(Strategy, "load_checkpoint", spy)
    newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
    assert cli.main([*args, "--ckpt_path", "last"]) == 0
    assert found[0] == newest
    assert [p.name for p in (tmp_path / "runs" / "dcl").iterdir()] == (
        ["version_0"] if not dirpath else ["version_0", "version_1"]
    )
    # The best two are kept, each with its memory, whatever folders they lie in.
    left = {path for path in folder.rglob("*.ckpt") if "other" not in path.parts}
    memories = {path for path in folder.rglob("*.ckpt.memory") if "other" not in path.parts}
    assert {Path(f"{path}.memory") for path in left} == memories
    assert len(left) <= 4


def test_a_checkpoint_does_not_choose_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('was_here', 'w')\nclass Net: ...\n")
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], trainer={"max_steps": 3})
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["backbone"] = {"class_path": "evil.Net", "init_args": {}}
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    assert cli.main(["test", "--ckpt_path", "evil.ckpt", "--trainer.logger", "false"]) == 2
    assert "evil.ckpt names the class evil.Net, which is not imported" in capsys.readouterr().err
    assert not (tmp_path / "was_here").exists()
