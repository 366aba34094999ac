"""Copies on a local disk: complete or absent, made once, and renewed if the source has changed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.sources import table as sources
from dcl_lightning.data.sources.cache import VARIABLE
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError
from tests.data import small_sets

PART = {"num_classes": 4, "size": 16}
SETS: dict[str, tuple[str, Callable[[Path], object], dict]] = {
    "cifar10": ("cifar10", lambda root: small_sets.cifar(root, 10), {}),
    "mnist": ("mnist", small_sets.mnist, {}),
    "candle": ("candle", lambda root: small_sets.candle(root, 4, 2), {"increment": 1}),
    "tinyimagenet": ("tinyimagenet", small_sets.tinyimagenet, {"source_options": {"num_classes": 4}}),
    "imagenet": ("imagenet", small_sets.imagenet, {"source_options": PART}),
    "lists within": (
        "imagenet100",
        lambda root: small_sets.listed(root, "ImageNet100", "100"),
        {"source_options": PART},
    ),
    "lists beside": (
        "imagenet100small",
        lambda root: small_sets.listed(root, "ImageNet100-small", "100_small", lists_beside=True),
        {"source_options": PART},
    ),
    "core50": ("core50", small_sets.core50, {"source_options": {"num_classes": 3, "size": 16}, "increment": 3}),
    "folder": (
        "folder",
        lambda root: small_sets.class_folders(root, "train", "val", ["a", "b"]),
        {"source_options": {"size": 16}},
    ),
    "class path": ("continuum.datasets.MNIST", small_sets.mnist, {}),
}


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def ready(name: str, root: Path, **options) -> ContinualDataModule:
    data = ContinualDataModule(name, root=str(root), num_workers=0, **options)
    data.prepare_data()
    data.setup()
    return data


def pixels(data: ContinualDataModule) -> torch.Tensor:
    rows = torch.arange(len(data.train_inputs))
    return torch.cat([batch.inputs for batch in data.train_eval_loader(rows)])


@pytest.mark.parametrize("kind", SETS)
def test_every_source_is_read_from_its_copy(tmp_path: Path, kind: str) -> None:
    name, write, options = SETS[kind]
    root, disk = tmp_path / "shared", tmp_path / "disk"
    root.mkdir()
    write(root)
    (root / "another set").write_text("not of this one")
    expected = pixels(ready(name, root, **options))
    data = ready(name, root, stage_to=str(disk), **options)
    targets = data.train_targets
    root.rename(tmp_path / "gone")
    assert torch.equal(pixels(data), expected)
    assert len(targets) == len(expected)
    assert len([entry for entry in os.listdir(disk) if not entry.endswith(".lock")]) == 1
    # To a class path belongs everything below the root.
    assert any(disk.rglob("another set")) == (kind == "class path")


def test_without_files_there_is_nothing_to_copy(tmp_path: Path) -> None:
    ready("digits", tmp_path, stage_to=str(tmp_path / "disk"))
    assert not (tmp_path / "disk").exists()


def copy_of(disk: Path) -> Path:
    (copy,) = (entry for entry in disk.iterdir() if entry.is_dir())
    return copy


def test_a_second_run_copies_nothing_and_a_changed_source_is_copied_anew(tmp_path: Path) -> None:
    root, disk = tmp_path / "shared", tmp_path / "disk"
    small_sets.imagenet(root)

    def read() -> torch.Tensor:
        return pixels(ready("imagenet", root, stage_to=str(disk), source_options=PART))

    first = read()
    before = copy_of(disk).stat().st_ino
    assert torch.equal(read(), first)
    assert copy_of(disk).stat().st_ino == before
    # Another image of the same name, then one more, then one that something has swept from the copy.
    file = root / "ImageNet" / "train" / small_sets.SYNSETS[0] / f"{small_sets.SYNSETS[0]}_0.JPEG"
    small_sets.image(file, color=250)
    os.utime(file, (1, 1))
    second = read()
    assert copy_of(disk).stat().st_ino != before
    assert not torch.equal(second, first)
    small_sets.image(file.with_name("more.JPEG"))
    assert len(read()) == len(first) + 1
    next(copy_of(disk).rglob("more.JPEG")).unlink()
    assert len(read()) == len(first) + 1
    assert [entry for entry in os.listdir(disk) if entry.endswith(".tmp")] == []


def test_links_are_followed_and_one_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    real, root, disk = tmp_path / "real", tmp_path / "shared", tmp_path / "disk"
    small_sets.imagenet(real)
    (root / "ImageNet").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageNet" / split).symlink_to(real / "ImageNet" / split)
    # A folder that leads back to itself.
    (real / "ImageNet" / "train" / small_sets.SYNSETS[0] / "round").symlink_to(real / "ImageNet" / "train")
    ready("imagenet", root, stage_to=str(disk), source_options=PART)
    assert not any(path.is_symlink() for path in disk.rglob("*"))
    (real / "ImageNet" / "val" / small_sets.SYNSETS[0] / "lost.JPEG").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"lost\.JPEG cannot be read: No such file"):
        ready("imagenet", root, stage_to=str(disk), source_options=PART)


def _stage_slowly(root: str, disk: str, log: str, slow: bool) -> None:
    inner = shutil.copyfile

    def copyfile(source: str, target: str) -> None:
        with open(log, "a") as file:
            file.write(f"{os.path.basename(source)}\n")
        if slow:
            time.sleep(0.3)
        inner(source, target)

    shutil.copyfile = copyfile
    sources.stage("mnist", root, disk, compare=True)


def test_of_many_processes_one_copies_and_what_a_killed_one_left_is_not_taken_for_a_copy(tmp_path: Path) -> None:
    root, disk, log = tmp_path / "shared", tmp_path / "disk", tmp_path / "log"
    small_sets.mnist(root)
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_stage_slowly, args=(str(root), str(disk), str(log), True))
    killed.start()
    while not log.exists():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert len(list(disk.glob(".*.tmp"))) == 1
    log.unlink()
    several = [fork.Process(target=_stage_slowly, args=(str(root), str(disk), str(log), False)) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * 4
    assert sorted(log.read_text().split()) == sorted(os.listdir(root / "MNIST" / "raw"))
    assert list(disk.glob(".*.tmp")) == []
    assert len(ready("mnist", root, stage_to=str(disk)).train_inputs) == 20


def test_what_goes_wrong_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, disk = tmp_path / "shared", tmp_path / "disk"

    def message(stage_to: Path = disk) -> str:
        with pytest.raises(DataError) as error:
            ready("mnist", root, stage_to=str(stage_to))
        assert "\n" not in str(error.value)
        return str(error.value)

    with pytest.raises(DatasetNotFoundError, match="mnist"):
        ready("mnist", root, stage_to=str(disk))
    assert not disk.exists()
    small_sets.mnist(root, 100)
    (tmp_path / "file").write_text("")
    assert f"data.stage_to={tmp_path / 'file' / 'x'}: Not a directory" in message(tmp_path / "file" / "x")
    # A disk that is full meanwhile, as far as one can be had here: files end at 10,000 bytes.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        text = message()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"data.stage_to={disk}: File too large" in text
    assert [entry for entry in os.listdir(disk) if not entry.endswith(".lock")] == []
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    text = message()
    assert "1,000 are free" in text
    assert "86," in text


def test_places_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    small_sets.imagenet(tmp_path)
    inside = tmp_path / "ImageNet" / "train" / "copies"
    with pytest.raises(ConfigurationError, match=r"stage_to=.*lies within the data set"):
        ready("imagenet", tmp_path, stage_to=str(inside), source_options=PART)
    assert not inside.exists()
    x, y = torch.zeros(4, 2), torch.arange(4)
    with pytest.raises(ConfigurationError, match="leave it out with data in memory"):
        ContinualDataModule((x, y, x, y), stage_to=str(tmp_path))
