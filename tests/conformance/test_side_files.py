"""A checkpoint and its memory files: valid together, removed together; uses of the checkpoint without them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

from dcl_lightning import NIL
from dcl_lightning.backbones import MLP
from dcl_lightning.checkpoint.buffer_files import RowsFile
from dcl_lightning.checkpoint.directory import latest_checkpoint, problem_of
from dcl_lightning.errors import CheckpointError
from tests.conformance.rehearsal_runs import assert_same_run, fit, make_nil
from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix, weights

KEPT = Path(__file__).parent.parent / "data" / "checkpoint_v1" / "step=8.ckpt"


pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path) -> dict[str, int]:
    """Each checkpoint with its number of side files; nothing else may be in the folder."""
    counts = {p.name: 0 for p in folder.glob("*.ckpt")}
    for memory in folder.glob("*.ckpt.memory"):
        (token,) = memory.iterdir()
        counts[memory.name.removesuffix(".memory")] += len(list(token.iterdir()))
    left = [p.name for p in folder.iterdir() if p.name.removesuffix(".memory") not in counts]
    assert not left
    return counts


class Custom(TorchCheckpointIO):
    """A user's own."""

    paths: list[str] = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.paths.append(os.path.basename(path))
        super().save_checkpoint(checkpoint, path, storage_options)


class ByHand(pl.Callback):
    """Saves after step 7."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("plugin", [None, Custom, AsyncCheckpointIO])
def test_each_checkpoint_has_its_memory_and_both_go_together(tmp_path: Path, plugin) -> None:
    savers = [
        ModelCheckpoint(tmp_path / "top", every_n_train_steps=1, save_top_k=2, monitor="train/loss", filename="{step}"),
        ModelCheckpoint(tmp_path / "one", every_n_train_steps=2, save_last=True, filename="{step}"),
        ModelCheckpoint(tmp_path / "link", every_n_train_steps=5, save_last="link", filename="{step}"),
        ModelCheckpoint(tmp_path / "light", every_n_train_steps=10, save_weights_only=True, filename="{step}"),
    ]
    if plugin is AsyncCheckpointIO:
        savers[2].save_last = None
    plugins = [plugin()] if plugin is not None else None
    trainer = {"plugins": plugins, "max_steps": 11}
    fit(tmp_path, callbacks=savers, trainer=trainer)
    top = list(saved(tmp_path / "top").values())
    assert top == [1] * 4 or (plugin is AsyncCheckpointIO and set(top) == {1})  # the best two of each task
    one = saved(tmp_path / "one")
    assert (one["step=10.ckpt"], one["last.ckpt"], set(one.values())) == (1, 1, {1})
    assert len(one) == 2 or plugin is AsyncCheckpointIO  # which may remove one before it has written it
    if plugin is not AsyncCheckpointIO:  # Lightning links what is not written yet
        assert saved(tmp_path / "link") == {"step=10.ckpt": 1, "last.ckpt": 0}
        assert (tmp_path / "link" / "last.ckpt").is_symlink()
    assert saved(tmp_path / "light") == {"step=10.ckpt": 0}
    if plugin is Custom:
        assert "step=10.ckpt" in Custom.paths
    whole = fit(tmp_path)
    for path in ("one/last.ckpt", "link/step=10.ckpt", *(["link/last.ckpt"] if savers[2].save_last else [])):
        assert not problem_of(tmp_path / path)
        assert_same_run(fit(tmp_path, ckpt=tmp_path / path), (whole[0], whole[1][10:]))
    with pytest.raises(CheckpointError, match="only weights"):
        fit(tmp_path, ckpt=tmp_path / "light" / "step=10.ckpt")


def test_saved_by_hand_anywhere_and_before_the_first_batch(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        whole = fit(tmp_path, callbacks=[ByHand(tmp_path / "a" / "seven.ckpt")])
    finally:
        os.umask(umask)
    (file,) = (tmp_path / "a" / "seven.ckpt.memory").glob("*/*")
    assert [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a" / "seven.ckpt", file)] == [0o640] * 2

    class Early(ModelCheckpoint):
        def on_train_start(self, trainer, module):
            super().on_train_start(trainer, module)
            trainer.save_checkpoint(tmp_path / "b" / "early.ckpt")

    resumed = fit(tmp_path, ckpt=tmp_path / "a" / "seven.ckpt", callbacks=[Early(tmp_path / "c")])
    assert_same_run(resumed, (whole[0], whole[1][7:]))
    shutil.rmtree(tmp_path / "a")
    assert_same_run(fit(tmp_path, ckpt=tmp_path / "b" / "early.ckpt"), resumed)


def test_what_a_killed_run_left_half_is_removed_at_the_start(tmp_path: Path) -> None:
    staging = tmp_path / ".staging"
    (staging / "dead").mkdir(parents=True)
    (staging / "dead" / "rank_0").write_bytes(b"half")
    (staging / "beef.part").write_bytes(b"half")
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], trainer={"max_steps": 3})
    assert not staging.exists()
    assert problem_of(tmp_path / "last.ckpt") == ""


class Killed(BaseException):
    """Ends a run at once, in the middle of a save."""


@pytest.mark.parametrize("name", ["{step}", "{step}-{train/loss:.1f}"])
def test_what_a_run_killed_within_a_save_left_is_removed_wherever_it_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every checkpoint callback, also where a metric's name makes a folder of each checkpoint."""

    def savers() -> list[ModelCheckpoint]:
        first = ModelCheckpoint(tmp_path / "a", every_n_train_steps=100)
        return [first, ModelCheckpoint(tmp_path / "b", every_n_train_steps=2, filename=name, save_top_k=-1)]

    # A kill lets nothing tidy up.
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        fit(tmp_path, callbacks=savers(), trainer={"max_steps": 2})
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert len(list(tmp_path.rglob("*.part"))) == 1
    fit(tmp_path, callbacks=savers(), trainer={"max_steps": 2})
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1
    assert not list(tmp_path.rglob(".staging"))


def test_a_lone_checkpoint_does_all_but_train(tmp_path: Path) -> None:
    agent, _ = fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    lone = tmp_path / "elsewhere" / "lone.ckpt"
    lone.parent.mkdir()
    shutil.copy(tmp_path / "last.ckpt", lone)
    again = NIL.load_from_checkpoint(lone, backbone=MLP([8]), weights_only=True)
    assert torch.equal(weights(again), weights(agent))
    data = make_data()
    for verb in ("validate", "test", "predict"):
        assert getattr(make_trainer(tmp_path), verb)(make_nil(data, seed=3), datamodule=data, ckpt_path=lone)
    with pytest.raises(CheckpointError, match=r"lone\.ckpt\.memory/.*rank_0 is missing: training resumes only with"):
        fit(tmp_path, ckpt=lone)
    assert "is missing" in problem_of(lone)
    assert problem_of(lone, resumes=False) == ""
    assert latest_checkpoint([*tmp_path.glob("*.ckpt"), lone])[0].parent == tmp_path


def test_a_checkpoint_of_format_1_resumes_for_ever(tmp_path: Path) -> None:
    """Kept in tests/data/ since the format began; a later format must still read it."""
    whole = fit(tmp_path)
    assert torch.load(KEPT, weights_only=True)["dcl_lightning"]["format"] == 1
    again, rest = fit(tmp_path, ckpt=KEPT)
    assert again.trainer.global_step == 18
    assert len(rest) == 10
    assert torch.allclose(rest, whole[1][8:], atol=1e-5)
    assert torch.equal(matrix(again).isnan(), matrix(whole[0]).isnan())


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    later = torch.load(KEPT, weights_only=True)
    later["dcl_lightning"]["format"] = 99
    torch.save(later, tmp_path / "later.ckpt")
    with pytest.raises(CheckpointError, match="has format 99, and this version reads up to 1: update"):
        fit(tmp_path, ckpt=tmp_path / "later.ckpt")


def test_a_run_without_a_memory_is_not_resumed_with_one(tmp_path: Path) -> None:
    data, saver = make_data(), ModelCheckpoint(tmp_path / "c", save_last=True)
    make_trainer(tmp_path, [saver], max_steps=4, limit_val_batches=0).fit(make_agent("base", data), datamodule=data)
    assert set(saved(tmp_path / "c").values()) == {0}
    checkpoint = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    checkpoint["dcl_lightning"]["agent"] = "NIL"
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match="has no memory"):
        fit(tmp_path, ckpt=tmp_path / "bare.ckpt")


@pytest.mark.parametrize("what", ["file", "token", "absolute"])
def test_a_checkpoint_names_no_file_outside_its_folder(what: str, tmp_path: Path) -> None:
    """Someone else's checkpoint could else read, and a run that goes on from it write, any file of the user's."""
    fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], trainer={"max_steps": 3})
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    memory = checkpoint["dcl_lightning"]["memory"]
    folder = tmp_path / "last.ckpt.memory"
    secret = tmp_path / "secret"
    shutil.copy(folder / memory["token"] / "rank_0", secret)  # of the right size and digest
    if what == "token":
        memory["token"] = ".."
        shutil.copy(secret, tmp_path / "rank_0")
    else:
        memory["files"][0]["name"] = "../../secret" if what == "file" else str(secret)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="is not to be trusted"):
        fit(tmp_path, ckpt=tmp_path / "last.ckpt")
    assert "is not to be trusted" in problem_of(tmp_path / "last.ckpt")
    assert latest_checkpoint([tmp_path / "last.ckpt"])[0] is None


def test_all_that_a_checkpoint_needs_is_on_the_disk_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's content and the folder's entry of it are two things to a file system."""
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def note_sync(number: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    def note_rename(source, target) -> None:
        done.append(str(target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    folder = tmp_path / "c"
    saver = ModelCheckpoint(folder, every_n_train_steps=3, filename="saved")
    fit(tmp_path, callbacks=[saver], trainer={"max_steps": 3})
    path = str(folder / "saved.ckpt")
    (token,) = Path(f"{path}.memory").iterdir()
    before, after = done[: done.index(path)], done[done.index(path) :]
    inner = [entry for entry in before if entry.startswith(str(tmp_path))]
    assert inner[0].endswith("/rank_0")
    assert inner[1:4] == [str(token), str(token.parent), str(folder)]
    assert inner[4].endswith(".part")
    assert after[1] == str(folder)


def test_rows_of_every_type_and_shape_come_back(tmp_path: Path) -> None:
    """The file holds columns as they lie in memory: also empty ones, booleans, halves, rows that are one number."""
    from dcl_lightning.checkpoint.buffer_files import write_memory
    from dcl_lightning.comm import SingleProcessComm
    from dcl_lightning.memory.buffer import RehearsalBuffer
    from dcl_lightning.memory.config import RehearsalConfig
    from dcl_lightning.memory.manager import MemoryManager
    from dcl_lightning.memory.storage import RowStore

    g = torch.Generator().manual_seed(0)
    rows = {
        "bytes": torch.randint(256, (40, 3, 5), generator=g, dtype=torch.uint8),
        "flags": torch.rand(40, 3, generator=g) > 0.5,
        "half": torch.randn(40, 2, generator=g).bfloat16(),
        "none": torch.zeros(40, 0),
        "number": torch.arange(40),
        "double": torch.randn(40, 7, generator=g, dtype=torch.float64),
    }

    def manager() -> MemoryManager:
        store = RowStore(rows, 30)
        buffer = RehearsalBuffer(1, 30, "reservoir", "fixed", None, store)
        config = RehearsalConfig(buffer_size=30, policy="reservoir", weighting="none")
        return MemoryManager(config, buffer, SingleProcessComm(), 4, rows, torch.device("cpu"))

    first, second = manager(), manager()
    for count in (0, 17, 40):
        first.buffer.add({name: column[:count] for name, column in rows.items()})
        with open(tmp_path / "memory", "wb") as file:
            write_memory(file, first)
        read = RowsFile(tmp_path / "memory")
        second.load_state_dict(read.header["manager"])
        places = torch.arange(len(second.buffer))
        slots = second.buffer.slots_at(places)
        read.read_into(second.buffer.store, places, slots)
        assert len(slots) == min(count, 30)
        ours, theirs = first.buffer.store.gather(slots), second.buffer.store.gather(slots)
        assert all(torch.equal(ours[name], theirs[name]) for name in rows)
