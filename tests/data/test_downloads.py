"""Downloads from a local server: checksums, and no partial download is taken for a data set."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torchvision.datasets

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.sources import tinyimagenet
from dcl_lightning.data.sources.torchvision import CIFAR_FILES
from dcl_lightning.errors import DataError
from tests.data import small_sets


class _Quiet(SimpleHTTPRequestHandler):
    def handle_one_request(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # who is sent something else goes early
            super().handle_one_request()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "served"))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{http.server_address[1]}/"
        http.shutdown()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def ready(name: str, root: Path, download: bool) -> ContinualDataModule:
    part = {"num_classes": 4} if name == "tinyimagenet" else None
    data = ContinualDataModule(name, root=str(root), download=download, source_options=part)
    data.prepare_data()
    data.setup()
    return data


def refused(name: str, root: Path, download: bool) -> str:
    with pytest.raises(DataError) as error:
        ready(name, root, download)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mnist(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = server
    small_sets.mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    archives = []
    for file in sorted(raw.iterdir()):
        archives.append(served / f"{file.name}.gz")
        archives[-1].write_bytes(gzip.compress(file.read_bytes()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(one.name, md5(one)) for one in archives])
    # Broken off while it was unpacked.
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    text = refused("mnist", tmp_path, download=False)
    assert str(images) in text
    assert "fetch the data set anew" in text
    assert len(ready("mnist", tmp_path, download=True).train_inputs) == 20
    # What is whole is left alone.
    before = images.stat().st_mtime_ns
    ready("mnist", tmp_path, download=True)
    assert images.stat().st_mtime_ns == before
    # An archive with another content than its checksum's.
    archives[0].write_bytes(gzip.compress(b"something else"))
    assert "data.download" in refused("mnist", tmp_path / "elsewhere", download=True)


def test_cifar(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = server
    small_sets.cifar(tmp_path / "made", 100, per_file=100)
    folder = tmp_path / "made" / "CIFAR100" / "cifar-100-python"
    archive = served / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    cls = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cls, "url", address + archive.name)
    monkeypatch.setattr(cls, "tgz_md5", md5(archive))
    monkeypatch.setattr(cls, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(cls, "test_list", [["test", md5(folder / "test")]])
    root = tmp_path / "root"
    assert len(ready("cifar100", root, download=True).train_inputs) == 100
    train = root / "CIFAR100" / CIFAR_FILES[100][0][0]
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as a CIFAR file" in refused("cifar100", root, download=False)
    assert len(ready("cifar100", root, download=True).train_inputs) == 100
    assert train.read_bytes() == whole
    # An archive that ends early, and no archive at all.
    archive.write_bytes(archive.read_bytes()[:-100])
    assert "data.download" in refused("cifar100", tmp_path / "early", download=True)
    archive.unlink()
    assert "404" in refused("cifar100", tmp_path / "none", download=True)
    assert "not found" in refused("cifar100", tmp_path / "none", download=False)


def test_a_file_is_mended_where_torchvision_has_it(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, address = server
    small_sets.cifar(tmp_path, 10)
    folder = (tmp_path / "CIFAR10" / "cifar-10-batches-py").rename(tmp_path / "cifar-10-batches-py")
    (tmp_path / "CIFAR10").rmdir()
    archive = served / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    cls = torchvision.datasets.CIFAR10
    files = [[file.name, md5(file)] for file in sorted(folder.iterdir())]
    monkeypatch.setattr(cls, "url", address + archive.name)
    monkeypatch.setattr(cls, "tgz_md5", md5(archive))
    monkeypatch.setattr(cls, "train_list", files)
    monkeypatch.setattr(cls, "test_list", [])
    assert len(ready("cifar10", tmp_path, download=True).train_inputs) == 100
    assert not (tmp_path / archive.name).exists()  # all was there
    (folder / "data_batch_2").write_bytes(b"cut off")
    assert len(ready("cifar10", tmp_path, download=True).train_inputs) == 100
    assert md5(folder / "data_batch_2") == dict(files)["data_batch_2"]
    assert not (tmp_path / "CIFAR10").exists()


def test_tinyimagenet(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = server
    made = small_sets.tinyimagenet(tmp_path / "made")
    shutil.make_archive(str(served / "tiny-imagenet-200"), "zip", made.parent, made.name)
    archive = served / "tiny-imagenet-200.zip"
    monkeypatch.setattr(tinyimagenet, "URL", address + archive.name)
    monkeypatch.setattr(tinyimagenet, "_MD5", md5(archive))
    root = tmp_path / "root"
    assert len(ready("tinyimagenet", root, download=True).train_inputs) == 24
    folder = root / "TinyImageNet" / "tiny-imagenet-200"
    assert {path.relative_to(made) for path in made.rglob("*")} <= {
        path.relative_to(folder) for path in folder.rglob("*")
    }
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == [
        ".dcl_lightning", ".download.lock",
    ]  # fmt: skip
    # What is there stays; what is missing comes.
    mine = folder / "train" / "mine.txt"
    mine.write_text("")
    shutil.rmtree(folder / "val")
    assert "--data.download true" in refused("tinyimagenet", root, download=False)
    assert len(ready("tinyimagenet", root, download=True).test_inputs) == 8
    assert mine.exists()
    # Another archive, and none.
    monkeypatch.setattr(tinyimagenet, "_MD5", "0" * 32)
    assert "data.download" in refused("tinyimagenet", tmp_path / "other", download=True)
    archive.unlink()
    assert "404" in refused("tinyimagenet", tmp_path / "none", download=True)
    assert "not found" in refused("tinyimagenet", tmp_path / "none", download=False)
    # Where the archive was unpacked into the root, nothing is fetched.
    shutil.copytree(made, tmp_path / "unpacked" / made.name)
    assert len(ready("tinyimagenet", tmp_path / "unpacked", download=True).train_inputs) == 24
