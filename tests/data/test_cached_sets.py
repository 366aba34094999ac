"""Data sets that are converted once and cached: Tiny ImageNet and CANDLE's NT3."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.decode import read_image
from dcl_lightning.data.sources import cache, tinyimagenet
from dcl_lightning.data.sources.cache import VARIABLE, cached
from dcl_lightning.errors import DataError
from tests.data import small_sets
from tests.data.small_sets import SYNSETS

PART = {"num_classes": 4}


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv(VARIABLE, raising=False)
    return folder


def tiny(root: Path, **options: Any) -> ContinualDataModule:
    data = ContinualDataModule("tinyimagenet", root=str(root), source_options=PART, batch_size=4, **options)
    data.prepare_data()
    data.setup()
    return data


def test_tinyimagenet_in_its_published_form(tmp_path: Path) -> None:
    base = small_sets.tinyimagenet(tmp_path)
    data = tiny(tmp_path)
    assert data.original_labels == SYNSETS
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((24, 3, 64, 64), (8, 3, 64, 64))
    assert (data.train_inputs.dtype, data.input_spec) == (torch.uint8, (3, 64, 64))
    first = base / "train" / SYNSETS[1] / "images" / f"{SYNSETS[1]}_3.JPEG"
    assert torch.equal(data.train_inputs[9], read_image(str(first)))
    assert data.train_targets.tolist() == np.repeat(np.arange(4), 6).tolist()
    assert data.test_targets.tolist() == [0, 1, 2, 3] * 2
    assert all(
        abs(float(x.float().mean()) - 50 * y) < 2 for x, y in zip(data.test_inputs, [0, 1, 2, 3] * 2, strict=True)
    )
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs.shape == (4, 3, 64, 64)


def test_the_cache_is_written_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_sets.tinyimagenet(tmp_path)
    before = tiny(tmp_path).train_inputs
    monkeypatch.setattr(tinyimagenet, "read_images", None)
    again = tiny(tmp_path).train_inputs
    assert torch.equal(before, again)
    (cache,) = (p for p in (base / ".dcl_lightning").iterdir() if p.is_dir())
    assert str(cache / "train.npy") in Path("/proc/self/maps").read_text()
    assert [p.name for p in base.rglob("*.tmp")] == []


def test_bars_reach_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[str, int, list[int]]] = []

    class Bar(contextlib.nullcontext[Any]):
        def __init__(self, desc: str, total: int, **_: object) -> None:
            super().__init__(self)
            bars.append((desc, total, []))

        def update(self, number: int) -> None:
            bars[-1][2].append(number)

    monkeypatch.setattr(cache, "tqdm", Bar)
    base = small_sets.tinyimagenet(tmp_path / "sets")
    tiny(tmp_path / "sets", stage_to=str(tmp_path / "disk"))
    files = [path for path in base.rglob("*") if path.is_file() and not path.name.startswith(".")]
    size = sum(path.stat().st_size for path in files if path.parent.name in ("images", "val") or "boxes" in path.name)
    assert [(name.split()[0], total, sum(done)) for name, total, done in bars] == [
        ("copying", size, size), ("writing", 24, 24), ("writing", 8, 8),
    ]  # fmt: skip


def test_other_images_make_another_cache(tmp_path: Path) -> None:
    base = small_sets.tinyimagenet(tmp_path)
    tiny(tmp_path)
    small_sets.image(base / "train" / SYNSETS[0] / "images" / "new.JPEG", (64, 64))
    assert len(tiny(tmp_path).train_inputs) == 25


def test_a_damaged_image_leaves_no_cache(tmp_path: Path) -> None:
    base = small_sets.tinyimagenet(tmp_path)
    file = base / "train" / SYNSETS[2] / "images" / f"{SYNSETS[2]}_1.JPEG"
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.raises(DataError, match=f"{SYNSETS[2]}_1.JPEG cannot be read"):
        tiny(tmp_path)
    assert [p for p in (base / ".dcl_lightning").iterdir() if p.suffix != ".lock"] == []
    file.write_bytes(whole)
    assert len(tiny(tmp_path).train_inputs) == 24


def test_a_data_set_that_cannot_be_written_to_is_cached_elsewhere(tmp_path: Path, home: Path) -> None:
    base = small_sets.tinyimagenet(tmp_path)
    # What keeps even root from writing there.
    (base / ".dcl_lightning").write_text("")
    assert len(tiny(tmp_path).train_inputs) == 24
    assert len(list((home / "dcl_lightning").rglob("train.npy"))) == 1
    assert len(tiny(tmp_path).train_inputs) == 24


def test_no_place_at_all_is_said_in_one_line(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_sets.tinyimagenet(tmp_path)
    (base / ".dcl_lightning").write_text("")
    (home / "dcl_lightning").write_text("")
    with pytest.raises(DataError) as error:
        tiny(tmp_path)
    text = str(error.value)
    assert all(word in text for word in (str(base / ".dcl_lightning"), str(home), VARIABLE))
    assert "\n" not in text
    monkeypatch.setenv(VARIABLE, str(tmp_path / "room"))
    assert len(tiny(tmp_path).train_inputs) == 24
    assert len(list((tmp_path / "room").rglob("train.npy"))) == 1


def test_of_several_processes_one_writes(tmp_path: Path) -> None:
    built = []

    def build(folder: str) -> None:
        built.append(folder)
        Path(folder, "x").write_text("whole")

    threads = [threading.Thread(target=cached, args=(str(tmp_path), "set", "mark", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert Path(cached(str(tmp_path), "set", "mark", build), "x").read_text() == "whole"


def test_what_a_killed_process_left_is_neither_used_nor_kept(tmp_path: Path) -> None:
    left = tmp_path / ".dcl_lightning" / ".set-mark.12345678.tmp"
    left.mkdir(parents=True)
    (left / "x").write_text("half")
    where = cached(str(tmp_path), "set", "mark", lambda folder: Path(folder, "x").write_text("whole") and None)
    assert Path(where, "x").read_text() == "whole"
    assert not left.exists()


@pytest.mark.parametrize("harm", ["annotation", "class"])
def test_wrong_annotations(tmp_path: Path, harm: str) -> None:
    file = small_sets.tinyimagenet(tmp_path) / "val" / "val_annotations.txt"
    file.write_text(file.read_text() + ("val_0.JPEG\n" if harm == "annotation" else "val_0.JPEG\tn9\t0\t0\t1\t1\n"))
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 9" if harm == "annotation" else "n9"):
        tiny(tmp_path)


def nt3(root: Path) -> ContinualDataModule:
    data = ContinualDataModule("candle", root=str(root), increment=1, batch_size=4)
    data.prepare_data()
    data.setup()
    return data


def test_candle_is_scaled_by_training_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_sets.candle(tmp_path)
    data = nt3(tmp_path)
    x, x_test = (np.loadtxt(base / name, delimiter=",", dtype=np.float32) for name in ("nt_train2.csv", "nt_test2.csv"))
    scale = np.abs(x[:, 1:]).max(0)
    assert data.train_inputs.shape == (8, 1, 1, 60_483)
    assert data.train_inputs.dtype == torch.float32
    assert np.allclose(data.train_inputs[:, 0, 0].numpy(), x[:, 1:] / np.where(scale == 0, 1, scale))
    assert np.allclose(data.test_inputs[:, 0, 0].numpy(), x_test[:, 1:] / np.where(scale == 0, 1, scale))
    assert float(data.train_inputs.abs().max()) == 1.0
    assert float(data.test_inputs.max()) > 1.0
    assert data.train_targets.tolist() == [0, 1] * 4
    assert (data.num_classes, data.num_tasks) == (2, 2)
    monkeypatch.setattr("dcl_lightning.data.sources.candle._parse", None)
    assert torch.equal(nt3(tmp_path).train_inputs, data.train_inputs)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1,2,3", ["row 3", "3 columns", "60484"]),
        ("1," + "0.5," * 60_482 + "abc", ["row 3", "column 60484", "'abc'"]),
        ("1," + "0.5," * 60_482 + "nan", ["row 3", "column 60484", "'nan'"]),
        ("1," + "0.5," * 60_482, ["row 3", "column 60484", "''"]),
        ("tumour," + "0.5," * 60_482 + "1", ["row 3", "column 1", "'tumour'"]),
        ("2," + "0.5," * 60_482 + "1", ["row 3", "label '2'", "0 or 1"]),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: str, words: list[str]) -> None:
    base = small_sets.candle(tmp_path, rows=2, test_rows=1)
    with (base / "nt_train2.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError) as error:
        nt3(tmp_path)
    assert all(word in str(error.value) for word in ["nt_train2.csv", *words])
    assert "\n" not in str(error.value)


def test_an_empty_table(tmp_path: Path) -> None:
    (small_sets.candle(tmp_path, 2, 1) / "nt_test2.csv").write_text("\n")
    with pytest.raises(DataError, match=r"nt_test2\.csv has no rows"):
        nt3(tmp_path)
