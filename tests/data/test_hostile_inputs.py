"""Data that cannot be used, on the command line: code 2 and one line that names the file, before anything starts.

What is only met when its turn comes (an image's content) ends the run likewise. What can be used is used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcl_lightning import cli
from dcl_lightning.data.sources.cache import VARIABLE
from tests.data import small_sets
from tests.data.damaged_sets import EARLY, Case, folder

SMALL = ["--data.batch_size", "4", "--data.num_workers", "0", "--model.epochs_per_task", "1"]
SMALL += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SMALL += ["--trainer.limit_train_batches", "2"]
PART = '{"num_classes": 4, "size": 16}'
OPTIONS = {
    "folder": ["--data.source_options", '{"size": 16}', "--data.increment", "1"],
    "imagenet": ["--data.source_options", PART],
    "imagenet100": ["--data.source_options", PART],
    "core50": ["--data.source_options", PART],
    "tinyimagenet": ["--data.source_options", '{"num_classes": 4}'],
    "candle": ["--data.increment", "1", "--model.backbone.hidden", "[4]"],
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))


def fit(dataset: str, *flags: str) -> int:
    return cli.main(["fit", "--data.dataset", dataset, *SMALL, *OPTIONS.get(dataset, []), *flags])


def check_refused(code: int, error: str, words: list[str]) -> None:
    assert code == 2
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line and not line.startswith("INFO")]
    assert 1 <= len(lines) <= 3, error
    (line,) = (line for line in lines if line.startswith("error:"))
    assert all(word in line for word in words), line


def run_refused(dataset: str, flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = fit(*dataset.split(), *flags)
    except SystemExit as end:
        code = end.code
    check_refused(code, capsys.readouterr().err, words)


@pytest.mark.parametrize("case", EARLY, ids=lambda case: case.__name__)
def test_refused_at_the_start(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "mes données"
    dataset, words = case(root)
    run_refused(dataset, ["--data.root", str(root)], words, capsys)
    assert not list(tmp_path.rglob("metrics.csv"))
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "trap").exists()


def image_that_is_text(file: Path) -> None:
    file.write_text("no image")


def image_cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def image_that_is_empty(file: Path) -> None:
    file.write_bytes(b"")


def image_that_is_a_broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("gone.JPEG")


def image_that_is_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "harm",
    [image_that_is_text, image_cut_off, image_that_is_empty, image_that_is_a_broken_link, image_that_is_a_folder],
)
def test_refused_when_its_turn_comes(
    harm: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "mes données")
    file = root / "test" / "dog" / "dog_1.JPEG"
    harm(file)
    run_refused("folder", ["--data.root", str(root)], [str(file), "cannot be read"], capsys)


SETS = '''
import numpy as np

class Set:
    """A data set of continuum's kind."""

    x, y = np.zeros((8, 6, 6, 3), dtype=np.float32), np.arange(8) // 2

    def __init__(self, path, train, download):
        pass

    def get_data(self):
        return self.x, self.y, None

class Fractions(Set):
    y = np.arange(8) / 2

class NaNLabels(Set):
    y = np.array([0, 0, 1, 1, 2, 2, 3, np.nan])

class Negative(Set):
    y = np.arange(8) // 2 - 1

class OneHot(Set):
    y = np.eye(4)[np.arange(8) // 2]

class Dates(Set):
    y = np.arange(8).astype("datetime64[D]")

class FewLabels(Set):
    y = np.arange(7) // 2

class NaNInputs(Set):
    x = np.where(np.arange(8)[:, None, None, None] == 5, np.nan, Set.x)

class Infinite(Set):
    x = np.where(np.arange(8)[:, None, None, None] == 2, np.inf, Set.x)

class Transparent(Set):
    x = np.zeros((8, 6, 6, 4), dtype=np.uint8)

class FiveChannels(Set):
    x = np.zeros((8, 6, 6, 5), dtype=np.uint8)

class Films(Set):
    x = np.zeros((8, 2, 3, 6, 6), dtype=np.uint8)

class Complex(Set):
    x = np.zeros((8, 6, 6), dtype=complex)

class Texts(Set):
    x = [["a"]] * 8

class Nothing(Set):
    x, y = np.zeros((0, 6, 6)), np.zeros(0, dtype=int)
'''


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Fractions", ["training labels", "whole numbers", "0.5"]),
        ("NaNLabels", ["training labels", "nan"]),
        ("Negative", ["training labels", "at least 0", "-1"]),
        ("OneHot", ["training labels", "one-hot"]),
        ("Dates", ["training labels", "datetime64"]),
        ("FewLabels", ["8 inputs and 7 labels"]),
        ("NaNInputs", ["training inputs", "row 5", "finite"]),
        ("Infinite", ["training inputs", "row 2", "finite"]),
        ("Transparent", ["alpha"]),
        ("FiveChannels", ["(8, 6, 6, 5)", "5 channels", "(n, C, H, W)"]),
        ("Films", ["(8, 2, 3, 6, 6)", "give (n, D)"]),
        ("Complex", ["complex128"]),
        ("Texts", ["training inputs", "give real numbers"]),
        ("Nothing", ["training split is empty"]),
    ],
)
def test_arrays_are_refused(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hostile_sets.py").write_text(SETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile_sets", raising=False)
    run_refused(f"hostile_sets.{name}", ["--data.root", str(tmp_path)], words, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--trainer.logger.save_dir", "taken/here"], "trainer.logger.save_dir"),
        (["--trainer.logger", "false", "--trainer.default_root_dir", "taken"], "trainer.default_root_dir"),
    ],
)
def test_no_place_for_results(flags: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    run_refused("digits", flags, [key, str(tmp_path / "taken"), "is no folder"], capsys)


def test_whatever_can_be_used_is(tmp_path: Path) -> None:
    """Grey, transparent, printed, indexed and 16-bit images, of one pixel and of many, under names of any kind."""
    root = folder(tmp_path / "mes données é")
    cat = root / "train" / "cat"
    for mode, ending in (("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "gif"), ("1", "bmp"), ("LA", "png")):
        small_sets.image(cat / f"{mode} noir.{ending}", (9, 14), mode)
    Image.fromarray(np.full((5, 7), 40_000, dtype=np.uint16)).save(cat / "16 bit.png")
    small_sets.image(cat / "1x1.png", (1, 1))
    small_sets.image(cat / "long.png", (300, 2))
    (cat / os.fsdecode(b"\xe9t\xe9.png")).symlink_to(cat / "1x1.png")
    (root / "train" / "notes.txt").write_text("no class")
    (root / "test" / "dog" / "dog_0.JPEG").unlink()
    assert fit("folder", "--data.root", str(root), "--trainer.limit_train_batches", "1.0") == 0
    report = json.loads((tmp_path / "runs/dcl/version_0/report/accuracy_matrix.json").read_text())
    assert report["task_classes"] == [["cat"], ["dog"]]
    assert report["samples_seen"]["new"] == 3 + 10 + 3


def test_labels_with_gaps_are_the_names_in_the_report(tmp_path: Path) -> None:
    base = small_sets.listed(tmp_path / "datasets", "ImageNet100", "100")
    for file in ("train_100.txt", "val_100.txt"):
        lines = (base / file).read_text().splitlines()
        # A line given twice is no contradiction.
        (base / file).write_text("".join(f"{line}7\n" for line in [*lines, lines[0]]))
    assert fit("imagenet100") == 0
    report = json.loads((tmp_path / "runs/dcl/version_0/report/accuracy_matrix.json").read_text())
    assert report["task_classes"] == [[7, 17], [27, 37]]


def test_one_class_is_a_stream_of_one_task(tmp_path: Path) -> None:
    small_sets.class_folders(tmp_path, "train", "test", ["cat"])
    assert fit("folder", "--data.root", str(tmp_path)) == 0
    report = json.loads((tmp_path / "runs/dcl/version_0/report/accuracy_matrix.json").read_text())
    assert report["matrix"] == [[1.0]]


def test_a_set_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    base = small_sets.tinyimagenet(tmp_path / "datasets")
    # What keeps even root from writing there.
    (base / ".dcl_lightning").write_text("")
    assert fit("tinyimagenet") == 0
    assert list((tmp_path / "home").rglob("train.npy"))
