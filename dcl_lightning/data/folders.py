"""Lists the images of a data set and their labels from folder names and list files, without opening an image."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dcl_lightning.errors import DataError

__all__ = ["IMAGE_ENDINGS", "core50", "listed", "per_class", "text_lines"]

# The image formats that torchvision and Pillow read, in upper or lower case.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".pcx", ".sgi", ".qoi",
)  # fmt: skip


def per_class(folder: str, split: str, training: bool, ignored: tuple[str, ...] = ()) -> tuple[list[str], np.ndarray]:
    """List ``split/<class>/.../<image>``, sorted by class name, then by image name.

    A warning counts the files without an image's ending, except those with an ``ignored`` one.

    Returns:
        The n files relative to ``folder``, and the class names ``(n,)`` str.

    Raises:
        DataError: no class folders, an empty one in training, or a broken link in place of one.
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
        images = _images(os.path.join(base, name), os.path.join(split, name), found)
        if not images and training:
            but = f", but {_listing(found)}" if found else ""
            raise DataError(
                f"class folder {os.path.join(base, name)} holds no images{but}: add some ({', '.join(IMAGE_ENDINGS)}), "
                "or remove the folder"
            )
        left_out += found
        names += images
        counts.append(len(images))
    for ending in ignored:
        del left_out[ending]
    _warn_of(base, left_out)
    # Reports are UTF-8: other names show their bytes, as in "caf\xe9".
    labels = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in classes]
    return names, np.repeat(np.array(labels, dtype=str), counts)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without ending"


def _listing(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in sorted(left_out.items()))


def _warn_of(folder: str, left_out: Counter[str]) -> None:
    if left_out:
        rank_zero_warn(
            f"{folder}: {left_out.total()} files that are no images in class folders are left out: {_listing(left_out)}"
        )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def _images(folder: str, prefix: str, left_out: Counter[str], parents: frozenset[str] = frozenset()) -> list[str]:
    """Return the images below a folder, sorted and prefixed; count the endings of all other files.

    Links are followed unless they lead back to a parent folder.
    """
    here = os.path.realpath(folder)
    if here in parents:
        return []
    found: list[str] = []
    for entry in _entries(folder):
        name = os.path.join(prefix, entry.name)
        if entry.name.lower().endswith(IMAGE_ENDINGS):
            found.append(name)
        elif entry.is_dir():
            found += _images(entry.path, name, left_out, parents | {here})
        else:
            left_out[_ending(entry.name)] += 1
    return sorted(found)


def listed(folder: str, list_file: str) -> tuple[list[str], np.ndarray]:
    """Read a list file with a line ``relative/path label`` for each image; skip empty lines.

    Returns:
        The n files relative to ``folder``, and the labels ``(n,)`` int64.

    Raises:
        DataError: a line of another form, a missing file, or an image with two labels.
    """
    labels: list[int] = []
    names: list[str] = []
    folders: dict[str, set[str]] = {}
    first: dict[str, tuple[int, int]] = {}
    for number, line in text_lines(list_file):
        name, _, word = line.replace("\t", " ").rpartition(" ")
        name = name.strip()
        where = f"{list_file}, line {number}"
        if not name or not word.isdecimal():
            raise DataError(f"{where}: expected 'relative/path label', found {line[:80]!r}")
        label = int(word)
        if label >= 1 << 63:
            raise DataError(f"{where}: label {word[:40]} is too large: give one below 2**63")
        parent, image = os.path.split(name)
        if parent not in folders:  # one listing of a folder instead of a look-up for each file
            try:
                folders[parent] = set(os.listdir(os.path.join(folder, parent)))
            except OSError:
                folders[parent] = set()
        if image not in folders[parent]:
            raise DataError(f"{where}: {os.path.join(folder, name)} does not exist")
        other_line, other = first.setdefault(name, (number, label))
        if other != label:
            raise DataError(f"{where}: {name} has label {label} here and label {other} in line {other_line}")
        names.append(name)
        labels.append(label)
    if not names:
        raise DataError(f"{list_file} names no images")
    return names, np.array(labels, dtype=np.int64)


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the 1-based number and the stripped text of each line that is not empty.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def core50(folder: str, training: bool) -> tuple[list[str], np.ndarray]:
    """List ``core50_128x128/s<session>/o<object>/<image>`` in the order of the sessions.

    Training has the images that the first column of ``core50_train.csv`` names; without this file, all sessions but
    3, 7 and 10, as published.

    Returns:
        The n files relative to ``folder``, and the 0-based objects ``(n,)`` int64.

    Raises:
        DataError: no training images of this form.
    """
    table = os.path.join(folder, "core50_train.csv")
    chosen = {line.split(",")[0].split(".")[0] for _, line in text_lines(table)} if os.path.exists(table) else None
    names: list[str] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    base = "core50_128x128"
    for session, session_name in _numbered(os.path.join(folder, base), "s"):
        for label, object_name in _numbered(os.path.join(folder, base, session_name), "o"):
            relative = os.path.join(base, session_name, object_name)
            for name in _images(os.path.join(folder, relative), relative, left_out):
                stem = os.path.basename(name).split(".")[0]
                if training == (stem in chosen if chosen is not None else session not in (3, 7, 10)):
                    names.append(name)
                    labels.append(label - 1)
    _warn_of(folder, left_out)
    if not names and training:
        raise DataError(f"{folder} holds no training images of the form core50_128x128/s<session>/o<object>/<image>")
    return names, np.array(labels, dtype=np.int64)


def _numbered(folder: str, letter: str) -> list[tuple[int, str]]:
    found = [(re.fullmatch(rf"{letter}(\d+)", entry.name), entry) for entry in _entries(folder)]
    return sorted((int(match[1]), entry.name) for match, entry in found if match and entry.is_dir())
