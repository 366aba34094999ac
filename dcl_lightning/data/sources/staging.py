"""Copies data sets to a local disk of each host, for its workers to read in place of a shared file system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dcl_lightning.data.sources.cache import fill, fingerprint
from dcl_lightning.data.sources.table import SOURCES, check_files
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError

__all__ = ["stage"]

# Files of a shared file system come faster side by side.
_THREADS, _CHUNK = 16, 64


def stage(name: str, root: str, stage_to: str, look: bool) -> str:
    """Return a root with a whole copy of a data set, made now or in an earlier run.

    The copy is whole if its files have the names, sizes and times of the source's. It is made under another name, by
    one process of a host while the others wait, and replaces one of a source that has changed since.

    Args:
        name: a key of ``SOURCES``, or the class path of a data set, to which everything below the root belongs.
        root: folder of the data sets; symbolic links are followed.
        stage_to: folder on the host's own disk, made if it is not there.
        look: whether a copy is compared with its source; else any is taken, since another process of the host has done
            so.

    Raises:
        DatasetNotFoundError: the source is not there; nothing is created.
        DataError: the source cannot be read, or the copy cannot be written.
        ConfigurationError: the copy would lie within what is copied.
    """
    source = SOURCES.get(name)
    if source is not None and not source.files:
        return root
    if source is not None:
        check_files(name, root, download=False)
    elif not os.path.isdir(root):
        raise DatasetNotFoundError(name, os.path.abspath(root), "the files of that data set", True)
    folder, files = (source.folder, source.files) if source is not None else ("", (".",))
    parts = [os.path.normpath(os.path.join(folder, file)) for one in files for file in one.split("|")]
    parts = [part for part in dict.fromkeys(parts) if os.path.exists(os.path.join(root, part))]
    base = os.path.realpath(os.path.join(root, folder))
    target = os.path.join(os.path.abspath(stage_to), f"{name}-{fingerprint(base)}")
    if not look and os.path.isdir(target):
        return target
    if any(_lies_in(os.path.realpath(target), os.path.realpath(os.path.join(root, part))) for part in parts):
        raise ConfigurationError(f"data.stage_to={stage_to} lies within the data set in {base}: give another folder")
    wanted = _contents(root, parts)
    try:
        fill(target, lambda new: _copy(root, new, wanted), lambda there: _is_whole(there, parts, wanted))
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"data set '{name}' in {base} cannot be copied to data.stage_to={stage_to}: {error.strerror or error}{at}"
        ) from error
    return target


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _contents(root: str, parts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return size and second of the last change of each file, by its name relative to the root."""
    found: dict[str, tuple[int, int]] = {}
    for part in parts:
        _look(root, part, found, frozenset())
    return found


def _look(root: str, name: str, found: dict[str, tuple[int, int]], above: frozenset[str]) -> None:
    path = os.path.join(root, name)
    try:
        if not os.path.isdir(path):
            stat = os.stat(path)
            found[os.path.normpath(name)] = stat.st_size, int(stat.st_mtime)
            return
        here = os.path.realpath(path)
        inside = [] if here in above else sorted(os.listdir(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for entry in inside:
        if not entry.startswith("."):  # caches, and what readers leave out
            _look(root, os.path.join(name, entry), found, above | {here})


def _is_whole(target: str, parts: Sequence[str], wanted: dict[str, tuple[int, int]]) -> bool:
    there = [part for part in parts if os.path.exists(os.path.join(target, part))]
    return os.path.isdir(target) and _contents(target, there) == wanted


def _copy(root: str, target: str, wanted: dict[str, tuple[int, int]]) -> None:
    total, room = sum(size for size, _ in wanted.values()), shutil.disk_usage(target).free
    if total > room:
        raise OSError(None, f"it has {total:,} bytes and {room:,} are free there; give another folder or make room")
    names = list(wanted)
    for folder in {os.path.dirname(name) for name in names}:
        os.makedirs(os.path.join(target, folder), exist_ok=True)

    def copy(chunk: list[str]) -> None:
        for name in chunk:
            shutil.copyfile(os.path.join(root, name), os.path.join(target, name))
            second = wanted[name][1]
            os.utime(os.path.join(target, name), (second, second))

    with ThreadPoolExecutor(_THREADS) as pool:
        copies = [pool.submit(copy, names[low : low + _CHUNK]) for low in range(0, len(names), _CHUNK)]
        try:
            for one in copies:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not _is_whole(target, list(wanted), wanted):
        raise OSError(None, "the data set changed meanwhile; start again")
