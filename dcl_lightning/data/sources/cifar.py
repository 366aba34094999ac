"""CIFAR-10 and CIFAR-100 from their Python pickles, of which nothing but arrays and lists is ever loaded."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from dcl_lightning.data.sources.cache import NoRoomError, cached, fingerprint, mapped, write_array
from dcl_lightning.errors import DataError

__all__ = ["FILES", "fetch_cifar", "mapped_cifar", "read_cifar"]

FILES = {
    10: (tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)), ("cifar-10-batches-py/test_batch",)),
    100: (("cifar-100-python/train",), ("cifar-100-python/test",)),
}
_ALLOWED = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def fetch_cifar(folder: str, num_classes: int) -> None:
    """Fetch what is not there or differs from its checksum.

    Args:
        folder: where the archive is unpacked.
        num_classes: 10 or 100.
    """
    import torchvision.datasets
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    known: Any = getattr(torchvision.datasets, f"CIFAR{num_classes}")
    sums = dict(known.train_list + known.test_list)
    if not all(check_integrity(os.path.join(folder, known.base_folder, file), sums[file]) for file in sums):
        download_and_extract_archive(known.url, folder, filename=known.filename, md5=known.tgz_md5)


def mapped_cifar(folder: str, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what ``read_cifar`` does, the images mapped from a cache, so that the workers of a host share them.

    Where no cache can be written each has its own.

    Args:
        folder: where the unpacked archive lies.
        num_classes: 10, or 100 for the fine labels of CIFAR-100.

    Raises:
        DataError: a file that cannot be read, by its name.
    """
    names = ("train", "train_labels", "test", "test_labels")

    def build(target: str) -> None:
        for name, array in zip(names, read_cifar(folder, num_classes), strict=True):
            write_array(target, name, array)

    stats = [os.stat(os.path.join(folder, file)) for files in FILES[num_classes] for file in files]
    mark = fingerprint(1, *[(s.st_size, s.st_mtime_ns) for s in stats])
    try:
        where = cached(folder, f"cifar{num_classes}", mark, build)
    except NoRoomError:
        return read_cifar(folder, num_classes)
    x, y, x_test, y_test = (mapped(where, name) for name in names)
    return x, y, x_test, y_test


def read_cifar(folder: str, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ``(x_train, y_train, x_test, y_test)``, images ``(n, 3, 32, 32)`` uint8 and labels ``(n,)`` int64.

    Args:
        folder: where the unpacked archive lies.
        num_classes: 10, or 100 for the fine labels of CIFAR-100.

    Raises:
        DataError: a file that cannot be read, by its name.
    """
    splits: list[np.ndarray] = []
    for files in FILES[num_classes]:
        parts = [_read(os.path.join(folder, file), num_classes) for file in files]
        splits += [np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])]
    return splits[0], splits[1], splits[2], splits[3]


def _read(path: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    label = "labels" if num_classes == 10 else "fine_labels"
    try:
        with open(path, "rb") as file:
            raw: Mapping[Any, Any] = _ArraysOnly(file, encoding="latin1").load()
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
