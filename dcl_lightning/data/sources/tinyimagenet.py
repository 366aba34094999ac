"""Tiny ImageNet as published, fetched by torchvision and decoded once into memory-mapped arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.decode import read_images
from dcl_lightning.data.folders import per_class, text_lines
from dcl_lightning.data.sources.cache import Arrays, cached, fingerprint, load_array
from dcl_lightning.errors import DataError

__all__ = ["FILES", "fetch_tinyimagenet", "read_tinyimagenet"]

FILES = ("train", "val/images", "val/val_annotations.txt")
URL, _MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
_SIZE, _CHUNK = 64, 256


def fetch_tinyimagenet(folder: str) -> None:
    """Fetch and unpack the published archive into ``folder`` unless its files are there; its checksum is verified."""
    from torchvision.datasets.utils import download_and_extract_archive

    if all(os.path.exists(os.path.join(folder, file)) for file in FILES):
        return
    # Unpacked next to its place: a folder that is there is whole, also if the process is killed.
    with TemporaryDirectory(dir=folder, prefix=".unpacked-") as unpacked:
        download_and_extract_archive(URL, unpacked, md5=_MD5, remove_finished=True)
        inside = os.path.join(unpacked, "tiny-imagenet-200")
        for name in os.listdir(inside):
            if not os.path.exists(os.path.join(folder, name)):
                os.rename(os.path.join(inside, name), os.path.join(folder, name))


def read_tinyimagenet(folder: str) -> Arrays:
    """Return ``(x_train, y_train, x_test, y_test)``: ``(n, 3, 64, 64)`` uint8, mapped, and WordNet ids ``(n,)`` str.

    The test split is the published validation set, because the published test set has no labels.

    Args:
        folder: the unpacked archive, with ``train/<wnid>/images``, ``val/images`` and ``val/val_annotations.txt``.

    Raises:
        DataError: a file that cannot be read, or no room for the arrays.
    """
    names, labels = per_class(folder, "train", training=True, ignored=(".txt",))  # bounding boxes
    test_names, test_labels = _annotated(folder)

    def build(target: str) -> None:
        _write(os.path.join(target, "train.npy"), [os.path.join(folder, name) for name in names])
        _write(os.path.join(target, "test.npy"), [os.path.join(folder, name) for name in test_names])

    where = cached(folder, "tinyimagenet", fingerprint(1, *names, *test_names), build)
    return load_array(where, "train"), labels, load_array(where, "test"), test_labels


def _annotated(folder: str) -> tuple[list[str], np.ndarray]:
    path = os.path.join(folder, "val", "val_annotations.txt")
    names, labels = [], []
    for number, line in text_lines(path):
        words = line.split("\t")
        if len(words) < 2:
            raise DataError(f"{path}, line {number}: expected an image and its class, found {line[:80]!r}")
        names.append(os.path.join("val", "images", words[0]))
        labels.append(words[1])
    return names, np.array(labels, dtype=str)


def _write(path: str, images: Sequence[str]) -> None:
    # Written, not mapped: a full disk raises an error here, but kills a process that writes to a map.
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, _SIZE, _SIZE)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in _decoded(images):
            file.write(chunk.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _decoded(images: Sequence[str]) -> Iterator[Tensor]:
    chunks = (images[low : low + _CHUNK] for low in range(0, len(images), _CHUNK))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # of threads, because torchvision's decoder releases the GIL
        while group := list(islice(chunks, 2 * threads)):
            yield from pool.map(lambda chunk: read_images(chunk, _SIZE, _SIZE), group)
