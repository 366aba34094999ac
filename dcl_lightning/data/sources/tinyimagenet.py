"""Tiny ImageNet as published, fetched by torchvision, or in Mammoth's arrays; written once as mapped arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from tempfile import TemporaryDirectory

import numpy as np
import torch

from dcl_lightning.data.decode import read_images
from dcl_lightning.data.folders import per_class, text_lines
from dcl_lightning.data.sources.cache import Arrays, cached, fingerprint, load_array, progress
from dcl_lightning.errors import DataError

__all__ = ["FILES", "fetch_tinyimagenet", "read_tinyimagenet"]

FILES = ("train", "val/images", "val/val_annotations.txt")
URL, _MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
_SIZE, _CHUNK = 64, 256
_PARTS = 20  # of each split, in Mammoth's arrays


def fetch_tinyimagenet(folder: str) -> None:
    """Fetch and unpack the published archive into ``folder`` unless a whole set is there; its checksum is verified."""
    from torchvision.datasets.utils import download_and_extract_archive

    if all(os.path.exists(os.path.join(folder, file)) for file in FILES) or _is_in_parts(folder):
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
        folder: the unpacked archive, with ``train/<wnid>/images``, ``val/images`` and ``val/val_annotations.txt``; or
            Mammoth's ``processed/{x,y}_{train,val}_{01..20}.npy``, whose labels are numbers: lines of the archive's
            ``wnids.txt``, from 0.

    Raises:
        DataError: a file that cannot be read, or no room for the arrays.
    """
    if _is_in_parts(folder):
        return _read_parts(folder)
    names, labels = per_class(folder, "train", training=True, ignored=(".txt",))  # bounding boxes
    test_names, test_labels = _annotated(folder)

    def build(target: str) -> None:
        for file, images in (("train.npy", names), ("test.npy", test_names)):
            _write(os.path.join(target, file), len(images), _decoded([os.path.join(folder, name) for name in images]))

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


def _is_in_parts(folder: str) -> bool:
    return os.path.isdir(os.path.join(folder, "processed")) and not os.path.exists(os.path.join(folder, "train"))


def _read_parts(folder: str) -> Arrays:
    files = {
        kind: [os.path.join(folder, "processed", f"{kind}_{part:02d}.npy") for part in range(1, _PARTS + 1)]
        for kind in ("x_train", "y_train", "x_val", "y_val")
    }
    parts = {kind: [_part(path) for path in paths] for kind, paths in files.items()}

    def build(target: str) -> None:
        for file, kind in (("train.npy", "x_train"), ("test.npy", "x_val")):
            chunks = chain.from_iterable(map(_pixels, files[kind], parts[kind]))
            _write(os.path.join(target, file), sum(map(len, parts[kind])), chunks)

    stats = [os.stat(path) for kind in ("x_train", "x_val") for path in files[kind]]
    where = cached(folder, "tinyimagenet", fingerprint(1, *[(s.st_size, s.st_mtime_ns) for s in stats]), build)
    labels, test_labels = (np.concatenate(parts[kind]) for kind in ("y_train", "y_val"))
    return load_array(where, "train"), labels, load_array(where, "test"), test_labels


def _part(path: str) -> np.ndarray:
    """Map one of Mammoth's arrays."""
    try:
        part: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array ({error}): fetch the data set anew") from error
    if os.path.basename(path).startswith("x_") and part.shape[1:] != (_SIZE, _SIZE, 3):
        raise DataError(f"{path} has shape {part.shape}, expected (n, {_SIZE}, {_SIZE}, 3): fetch the data set anew")
    return part


def _pixels(path: str, part: np.ndarray) -> Iterator[np.ndarray]:
    """Yield images ``(n, 64, 64, 3)`` in [0, 1] as the ``(n, 3, 64, 64)`` uint8 that they were made from."""
    for low in range(0, len(part), _CHUNK):
        chunk = np.asarray(part[low : low + _CHUNK])
        if chunk.dtype != np.uint8:
            if not (chunk.min() >= 0 and chunk.max() <= 1):
                raise DataError(f"{path} has pixels that are not in [0, 1]: fetch the data set anew")
            chunk = np.rint(chunk * 255).astype(np.uint8)
        yield chunk.transpose(0, 3, 1, 2)


def _write(path: str, count: int, chunks: Iterable[np.ndarray]) -> None:
    # Written, not mapped: a full disk raises an error here, but kills a process that writes to a map.
    with open(path, "wb") as file, progress(f"writing {os.path.basename(path)} once", count, " images") as bar:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, _SIZE, _SIZE)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.tobytes())
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _decoded(images: Sequence[str]) -> Iterator[np.ndarray]:
    chunks = (images[low : low + _CHUNK] for low in range(0, len(images), _CHUNK))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # of threads, because torchvision's decoder releases the GIL
        while group := list(islice(chunks, 2 * threads)):
            yield from pool.map(lambda chunk: read_images(chunk, _SIZE, _SIZE).numpy(), group)
