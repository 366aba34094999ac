"""Lists the images of a data set and their labels, from folder names and list files; opens no image."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dcl_lightning.errors import DataError

__all__ = ["IMAGE_ENDINGS", "core50", "listed", "per_class"]

# Of the formats that torchvision and Pillow read, those of images; in any case.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".pcx", ".sgi", ".qoi",
)  # fmt: skip


def per_class(folder: str, split: str, training: bool, others: tuple[str, ...] = ()) -> tuple[list[str], np.ndarray]:
    """List ``split/<class>/.../<image>``, classes and images each in the order of their names.

    Files that are no images by their ending are left out, which is told in one line.

    Args:
        folder: folder of the data set.
        split: its sub-folder.
        training: whether a class without images is refused.
        others: endings of other files that belong to the data set, which are not told of.

    Returns:
        The files relative to ``folder``, and ``(n,)`` str, the class of each.

    Raises:
        DataError: no class folders, an empty one in training, or a link to nowhere in place of one.
    """
    base = os.path.join(folder, split)
    entries = _entries(base)
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(f"{entry.path} is a broken link: mend it or remove it")
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise DataError(f"{base} holds no class folders: expected {split}/<class>/<image>")
    names: list[str] = []
    counts: list[int] = []
    left_out = Counter(_ending(entry.name) for entry in entries if not entry.is_dir())
    for name in classes:
        found: Counter[str] = Counter()
        images = [os.path.join(split, name, image) for image in _images(os.path.join(base, name), found)]
        if not images and training:
            but = f", but {_listing(found)}" if found else ""
            raise DataError(
                f"class folder {os.path.join(base, name)} holds no images{but}: add some ({', '.join(IMAGE_ENDINGS)}), "
                "or remove the folder"
            )
        left_out += found
        names += images
        counts.append(len(images))
    _tell(base, left_out, others)
    # Reports and tables are UTF-8: of other names the bytes are shown, as in "caf\xe9".
    labels = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in classes]
    return names, np.repeat(np.array(labels, dtype=str), counts)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without ending"


def _listing(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in sorted(left_out.items()))


def _tell(folder: str, left_out: Counter[str], others: tuple[str, ...] = ()) -> None:
    told = Counter({ending: count for ending, count in left_out.items() if ending not in others})
    if told:
        rank_zero_warn(
            f"{folder}: {told.total()} files that are no images in class folders are left out: {_listing(told)}"
        )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def _images(folder: str, left_out: Counter[str], inside: str = "", above: frozenset[str] = frozenset()) -> list[str]:
    """Return the images beneath a folder, relative to it, sorted; links are followed, but not in circles.

    Args:
        folder: where to look.
        left_out: the endings of other files are counted in it.
        inside: what stands before each name.
        above: folders that this one lies in.
    """
    here = os.path.realpath(folder)
    if here in above:
        return []
    found: list[str] = []
    for entry in _entries(folder):
        name = os.path.join(inside, entry.name)
        if entry.name.lower().endswith(IMAGE_ENDINGS):
            found.append(name)
        elif entry.is_dir():
            found += _images(entry.path, left_out, name, above | {here})
        else:
            left_out[_ending(entry.name)] += 1
    return sorted(found)


def listed(folder: str, list_file: str) -> tuple[list[str], np.ndarray]:
    """Read a list file with a line ``relative/path label`` for each image.

    Args:
        folder: what the paths are relative to.
        list_file: the list; empty lines are left out.

    Returns:
        The files relative to ``folder``, and ``(n,)`` int64, the label of each.

    Raises:
        DataError: a line of another form, one that names a file that is not there, or an image with two labels.
    """
    names: list[str] = []
    labels: list[int] = []
    there: dict[str, set[str]] = {}
    first: dict[str, tuple[int, int]] = {}
    for number, line in _lines(list_file):
        name, _, label = line.rpartition(" ")
        if not name or not label.isdecimal():
            raise DataError(f"{list_file}, line {number}: expected 'relative/path label', found {line[:80]!r}")
        if int(label) >= 1 << 63:
            raise DataError(f"{list_file}, line {number}: label {label[:40]} is too large: give one below 2**63")
        parent, image = os.path.split(name.strip())
        if parent not in there:
            # One look at a folder in place of one at each of its files.
            there[parent] = _names_in(os.path.join(folder, parent))
        if image not in there[parent]:
            raise DataError(f"{list_file}, line {number}: there is no {os.path.join(folder, name.strip())}")
        line_before, label_before = first.setdefault(name.strip(), (number, int(label)))
        if label_before != int(label):
            raise DataError(
                f"{list_file}, line {number}: {name.strip()} has label {int(label)} here and label {label_before} in "
                f"line {line_before}"
            )
        names.append(name.strip())
        labels.append(int(label))
    if not names:
        raise DataError(f"{list_file} names no images")
    return names, np.array(labels, dtype=np.int64)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip().replace("\t", " ")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _names_in(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def core50(folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    """List ``core50_128x128/s<session>/o<object>/<image>``, sessions in their order.

    Training has the images that ``core50_train.csv`` names in its first column, where there is such a file; else
    the sessions other than 3, 7 and 10, as published.

    Args:
        folder: folder of the data set.
        training: which split.

    Returns:
        The files relative to ``folder``, and ``(n,)`` int64, the object of each, from 0.

    Raises:
        DataError: nothing of this form is there.
    """
    table = os.path.join(folder, "core50_train.csv")
    chosen = {line.split(",")[0].split(".")[0] for _, line in _lines(table)} if os.path.exists(table) else None
    names: list[str] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for session, inner in _numbered(os.path.join(folder, "core50_128x128"), "s"):
        for label, within in _numbered(inner, "o"):
            for image in _images(within, left_out):
                stem = os.path.basename(image).split(".")[0]
                if training == (stem in chosen if chosen is not None else session not in (3, 7, 10)):
                    names.append(os.path.relpath(os.path.join(within, image), folder))
                    labels.append(label - 1)
    _tell(folder, left_out)
    if not names and training:
        raise DataError(f"{folder} holds no training images of the form core50_128x128/s<session>/o<object>/<image>")
    return names, np.array(labels, dtype=np.int64)


def _numbered(folder: str, letter: str) -> list[tuple[int, str]]:
    found = [(re.fullmatch(rf"{letter}(\d+)", entry.name), entry) for entry in _entries(folder)]
    return sorted((int(match[1]), entry.path) for match, entry in found if match and entry.is_dir())
