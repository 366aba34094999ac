"""Tiny ImageNet as published, decoded once into memory-mapped arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.images.decode import read_images
from dcl_lightning.data.images.folders import per_class
from dcl_lightning.data.sources.cache import cached, fingerprint, mapped
from dcl_lightning.errors import DataError

__all__ = ["SIZE", "read_tinyimagenet"]

SIZE = 64
_CHUNK = 256


def read_tinyimagenet(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ``(x_train, y_train, x_test, y_test)``: ``(n, 3, 64, 64)`` uint8, mapped, and ``(n,)`` str, WordNet ids.

    The test split is the published validation set: the published test set has no labels.

    Args:
        folder: where the unpacked archive lies: ``train/<wnid>/images``, ``val/images``, ``val/val_annotations.txt``.

    Raises:
        DataError: something that cannot be read, or no room for the arrays.
    """
    names, labels = per_class(folder, "train", training=True, others=(".txt",))  # of boxes
    test_names, test_labels = _annotated(folder)

    def build(target: str) -> None:
        _write(os.path.join(target, "train.npy"), [os.path.join(folder, name) for name in names])
        _write(os.path.join(target, "test.npy"), [os.path.join(folder, name) for name in test_names])

    where = cached(folder, "tinyimagenet", fingerprint(1, *names, *test_names), build)
    return mapped(where, "train"), labels, mapped(where, "test"), test_labels


def _annotated(folder: str) -> tuple[list[str], np.ndarray]:
    path = os.path.join(folder, "val", "val_annotations.txt")
    names, labels = [], []
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            words = line.rstrip("\n").split("\t")
            if len(words) < 2:
                raise DataError(f"{path}, line {number}: expected an image and its class, found {line[:80]!r}")
            names.append(os.path.join("val", "images", words[0]))
            labels.append(words[1])
    return names, np.array(labels, dtype=str)


def _write(path: str, images: Sequence[str]) -> None:
    # Written rather than mapped: a full disk is an error here, and kills the process there.
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, SIZE, SIZE)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in _decoded(images):
            file.write(chunk.numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def _decoded(images: Sequence[str]) -> Iterator[Tensor]:
    chunks = (images[low : low + _CHUNK] for low in range(0, len(images), _CHUNK))
    threads = torch.get_num_threads()
    # Threads suffice: torchvision's decoder lets go of the interpreter.
    with ThreadPoolExecutor(threads) as pool:
        while group := list(islice(chunks, 2 * threads)):
            yield from pool.map(lambda chunk: read_images(chunk, SIZE, SIZE), group)
