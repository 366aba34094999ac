"""Data sets where other programs have them, or where their archives were unpacked: found, staged, cached there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.sources import table as sources
from dcl_lightning.data.sources.cache import VARIABLE
from dcl_lightning.errors import DataError, DatasetNotFoundError
from tests.data import small_sets

PART = {"num_classes": 4, "size": 16}
# Name, folder of the package's own place, what lies in it, writer, options.
SETS: dict[str, tuple[str, tuple[str, ...], Callable[[Path], Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", ("cifar-10-batches-py",), lambda root: small_sets.cifar(root, 10), {}),
    "cifar100": ("CIFAR100", ("cifar-100-python",), lambda root: small_sets.cifar(root, 100, 100), {}),
    "tinyimagenet": (
        "TinyImageNet", ("tiny-imagenet-200",), small_sets.tinyimagenet, {"source_options": {"num_classes": 4}}
    ),
    "imagenet": ("ImageNet", ("train", "val"), small_sets.imagenet, {"source_options": PART}),
    "core50": (
        "CORe50", ("core50_128x128",), small_sets.core50,
        {"source_options": {"num_classes": 3, "size": 16}, "increment": 3},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def pixels(name: str, root: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    data = ContinualDataModule(name, root=str(root), num_workers=0, **options)
    data.prepare_data()
    data.setup()
    rows = torch.arange(len(data.train_inputs))
    return torch.cat([batch.inputs for batch in data.train_eval_loader(rows)]), data.train_targets


def moved_up(root: Path, name: str) -> None:
    folder, parts, _, _ = SETS[name]
    for part in parts:
        (root / folder / part).rename(root / part)
    (root / folder).rmdir()


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", SETS)
def test_it_is_found_below_the_root_itself_and_copied_from_there(name: str, tmp_path: Path) -> None:
    folder, _, write, options = SETS[name]
    root = tmp_path / "root"
    root.mkdir()
    write(root)
    (root / "another set").write_text("not of this one")
    expected = pixels(name, root, **options)
    for path in list(root.rglob(".dcl_lightning")):  # what the first reading has cached
        path.rename(tmp_path / "cached")
    moved_up(root, name)
    assert same(pixels(name, root, **options), expected)
    assert same(pixels(name, root, stage_to=str(tmp_path / "disk"), **options), expected)
    assert not any((tmp_path / "disk").rglob("another set"))
    assert not (root / folder).exists()
    root.rename(tmp_path / "gone")
    (copy,) = (entry for entry in (tmp_path / "disk").iterdir() if entry.is_dir())
    assert same(pixels(name, copy, **options), expected)


# The data set, what is renamed, and what it is called then.
OTHERS: dict[str, tuple[str, str, str]] = {
    "cifar10 of Avalanche": ("cifar10", "CIFAR10", "cifar10"),
    "cifar100 of Avalanche": ("cifar100", "CIFAR100", "cifar100"),
    "mnist of Avalanche": ("mnist", "MNIST", "mnist/MNIST"),
    "mnist of Mammoth": ("mnist", "MNIST", "MNIST/MNIST"),
    "tinyimagenet of Avalanche": (
        "tinyimagenet", "TinyImageNet/tiny-imagenet-200", "tinyimagenet/tiny-imagenet-200"
    ),
    "core50 of Avalanche": ("core50", "CORe50", "core50"),
    "imagenet in small letters": ("imagenet", "ImageNet", "imagenet"),
    "imagenet100 of continuum": ("imagenet100", "ImageNet100", "."),
}  # fmt: skip
WRITERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    **{name: entry[2:] for name, entry in SETS.items()},
    "mnist": (small_sets.mnist, {}),
    "imagenet100": (lambda root: small_sets.listed(root, "ImageNet100", "100"), {"source_options": PART}),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_it_is_found_where_another_program_has_it(layout: str, tmp_path: Path) -> None:
    name, before, after = OTHERS[layout]
    write, options = WRITERS[name]
    write(tmp_path / "root")
    expected = pixels(name, tmp_path / "root", **options)
    root = tmp_path / "theirs"
    moved = (tmp_path / "root" / before).rename(tmp_path / "moved")
    (root / after).parent.mkdir(parents=True, exist_ok=True)
    moved.rename(root / after)
    for path in list(root.rglob(".dcl_lightning")):  # what the first reading has cached
        path.rename(tmp_path / "cached")
    assert same(pixels(name, root, **options), expected)
    assert same(pixels(name, root, stage_to=str(tmp_path / "disk"), **options), expected)


def test_mammoths_arrays_of_tinyimagenet(tmp_path: Path) -> None:
    whole = small_sets.tinyimagenet_in_parts(tmp_path)
    options: dict[str, Any] = {"source_options": {"num_classes": 4}}
    for more in ({}, {"download": True}, {"stage_to": str(tmp_path / "disk")}):  # nothing is fetched
        inputs, targets = pixels("tinyimagenet", tmp_path, **options, **more)
        assert torch.equal(inputs, torch.from_numpy(whole["x_train"]).permute(0, 3, 1, 2))
        assert targets.tolist() == whole["y_train"].tolist()
    splits = sources.load("tinyimagenet", str(tmp_path), download=False)
    assert torch.equal(torch.as_tensor(splits.test_inputs), torch.from_numpy(whole["x_val"]).permute(0, 3, 1, 2))
    assert splits.test_labels.tolist() == whole["y_val"].tolist()
    assert not (tmp_path / "TinyImageNet").exists()


@pytest.mark.parametrize(
    ("file", "array", "word"),
    [
        ("x_train_07.npy", None, "x_train_07.npy cannot be read"),
        ("x_val_20.npy", b"\x93NUMPY", "x_val_20.npy cannot be read"),
        ("x_train_07.npy", np.full((2, 64, 64, 3), 255.0), "x_train_07.npy has pixels that are not in [0, 1]"),
        ("x_train_07.npy", np.full((2, 64, 64, 3), np.nan), "x_train_07.npy has pixels that are not in [0, 1]"),
        ("x_train_07.npy", np.zeros((2, 3, 64, 64)), "x_train_07.npy has shape (2, 3, 64, 64)"),
        ("y_train_07.npy", np.zeros(3), "40 inputs and 41 labels"),
    ],
)
def test_a_wrong_part_of_them_is_named(file: str, array: Any, word: str, tmp_path: Path) -> None:
    small_sets.tinyimagenet_in_parts(tmp_path)
    path = tmp_path / "TINYIMG" / "processed" / file
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(DataError) as error:
        sources.load("tinyimagenet", str(tmp_path), download=False)
    assert word in str(error.value)


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])
def test_of_two_the_package_takes_the_one_in_its_own_place(name: str, tmp_path: Path) -> None:
    _, _, write, options = SETS[name]
    write(tmp_path)
    moved_up(tmp_path, name)
    theirs = pixels(name, tmp_path, **options)
    if name == "tinyimagenet":
        small_sets.tinyimagenet(tmp_path, small_sets.SYNSETS[::-1])  # of other colours
    else:
        write(tmp_path)
    ours = pixels(name, tmp_path, **options)
    assert not torch.equal(ours[0], theirs[0])
    # One that lacks a file is none.
    next((tmp_path / SETS[name][0]).rglob("val_annotations.txt" if name == "tinyimagenet" else "test")).unlink()
    assert same(pixels(name, tmp_path, **options), theirs)


def test_two_sets_in_one_root_have_their_own_caches(tmp_path: Path) -> None:
    for name in ("cifar10", "cifar100"):
        SETS[name][2](tmp_path)
        moved_up(tmp_path, name)
    found = {name: pixels(name, tmp_path) for name in ("cifar10", "cifar100")}
    again = {name: pixels(name, tmp_path) for name in ("cifar10", "cifar100")}
    assert all(same(found[name], again[name]) for name in found)
    assert not torch.equal(found["cifar10"][0], found["cifar100"][0])
    assert len([path for path in (tmp_path / ".dcl_lightning").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("name", SETS)
def test_a_missing_one_names_all_its_places(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as error:
        ContinualDataModule(name, root=str(tmp_path), increment=1).prepare_data()
    source = sources.SOURCES[name]
    for place in (source.folder, *source.elsewhere):
        assert f"{(tmp_path / place)}" in str(error.value)
    assert " or " in str(error.value)
    assert "\n" not in str(error.value)
