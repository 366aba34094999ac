"""Folders made once from a data set's files: caches of its arrays, and copies of its files on a host's own disk."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from dcl_lightning.errors import DataError
from dcl_lightning.paths import absolute

__all__ = [
    "VARIABLE", "Arrays", "NoRoomError", "cached", "cached_arrays", "copied", "fingerprint", "load_array",
    "one_at_a_time", "progress",
]  # fmt: skip

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x_train, y_train, x_test, y_test

VARIABLE = "DCL_LIGHTNING_CACHE"
_log = logging.getLogger(__name__)


class NoRoomError(DataError):
    """A cache that cannot be written anywhere."""


def fingerprint(*words: object) -> str:
    """Return 12 hexadecimal digits of the hash of the words' text."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(str(word).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:12]


def progress(what: str, total: int, unit: str) -> tqdm:
    """Return a bar that ``update(number)`` moves; it shows on a terminal alone, and goes when it is closed.

    Args:
        what: is done, for the eye.
        total: number of units.
        unit: such as ``B``.
    """
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None, leave=False)


# -- caches --------------------------------------------------------------------------------------------------------


def cached(folder: str, name: str, mark: str, build: Callable[[str], None]) -> str:
    """Return a folder that ``build`` filled, now or in an earlier run.

    It lies in ``.dcl_lightning`` in the data set's folder, or if that is not writable, in the user's cache folder; the
    environment variable ``DCL_LIGHTNING_CACHE`` names another place.

    Args:
        folder: folder of the data set.
        name: name of the content.
        mark: fingerprint of what the content is made from.
        build: fills the empty folder that it is given.

    Raises:
        NoRoomError: no place is writable.
    """
    given = os.environ.get(VARIABLE) and absolute(os.environ[VARIABLE])
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dcl_lightning")
    away = f"{name}-{mark}-{fingerprint(os.path.realpath(folder))}"
    inside = os.path.join(folder, ".dcl_lightning", f"{name}-{mark}")
    targets = [os.path.join(given, away)] if given else [inside, os.path.join(home, away)]
    for target in targets:
        if os.path.isdir(target):
            return target
    reasons = []
    for target in targets:
        try:
            _fill(target, build)
        except OSError as error:
            reasons.append(f"{os.path.dirname(target)} ({error.strerror})")
        else:
            return target
    raise NoRoomError(
        f"data set '{name}' has to be written once in another form, and none of these places takes it: "
        f"{', '.join(reasons)}; set the environment variable {VARIABLE} to a folder with room"
    )


def cached_arrays(folder: str, name: str, files: Sequence[str], read: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of ``read``, mapped from a cache that is rewritten when a file's size or time changes.

    Args:
        folder: folder of the data set.
        name: name of the data set.
        files: relative to ``folder``.
        read: reads these files.
    """
    names = ("train", "train_labels", "test", "test_labels")

    def build(target: str) -> None:
        for part, array in zip(names, read(), strict=True):
            # Down to the disk: a truncated file would kill the process that maps it.
            with open(os.path.join(target, f"{part}.npy"), "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())

    stats = [os.stat(os.path.join(folder, file)) for file in files]
    where = cached(folder, name, fingerprint(1, *[(s.st_size, s.st_mtime_ns) for s in stats]), build)
    x, y, x_test, y_test = (load_array(where, part) for part in names)
    return x, y, x_test, y_test


def load_array(where: str, name: str) -> np.ndarray:
    """Return the array ``name`` of a cache, memory-mapped."""
    # Copy-on-write, because torch warns of read-only arrays; nothing writes to it.
    array: np.ndarray = np.load(os.path.join(where, f"{name}.npy"), mmap_mode="c")
    return array


def _fill(target: str, build: Callable[[str], None], is_whole: Callable[[str], bool] = os.path.isdir) -> None:
    """Let ``build`` fill a folder under a temporary name, then rename it; one process at a time, the others wait.

    A ``target`` that is not whole is replaced.
    """
    parent, name = os.path.split(target)
    os.makedirs(parent, exist_ok=True)
    with one_at_a_time(os.path.join(parent, f".{name}.lock")) as locked:
        if is_whole(target):
            return
        if locked:  # no other process writes, so these are what a killed one left
            for left in glob.glob(os.path.join(glob.escape(parent), f".{name}.*.tmp")):
                shutil.rmtree(left, ignore_errors=True)
        _log.info("writing %s, once", target)
        mark = uuid.uuid4().hex[:8]
        temporary, old = (os.path.join(parent, f".{name}.{mark}{part}.tmp") for part in ("", ".old"))
        os.mkdir(temporary)
        try:
            build(temporary)
            if os.path.isdir(target):
                os.rename(target, old)
            os.rename(temporary, target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # Without working locks another process may have been first.
            if not (isinstance(error, OSError) and is_whole(target)):
                raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(path: str) -> Iterator[bool]:
    """Hold the lock of a file among processes during the block; yield False on file systems without locks."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems: several processes do the work, and the last results are dropped.
            yield False
        else:
            yield True


# -- copies --------------------------------------------------------------------------------------------------------

_THREADS, _CHUNK = 16, 64  # shared file systems deliver several files at once faster
_Contents = dict[str, tuple[int, int]]  # size and second of the last change of each file, by relative name


def copied(root: str, parts: Sequence[str], target: str) -> None:
    """Make ``target`` a whole copy of ``parts``, files and folders relative to ``root``, unless an earlier run did.

    A copy is whole if its files have the names, sizes and times of the source's; a copy of a source that has changed is
    replaced. Links are followed; names that begin with a dot are left out.

    Raises:
        DataError: the source cannot be read.
        OSError: the copy cannot be written.
    """
    wanted = _contents(root, parts)

    def is_whole(folder: str) -> bool:
        found = [part for part in parts if os.path.exists(os.path.join(folder, part))]
        return os.path.isdir(folder) and _contents(folder, found) == wanted

    def build(folder: str) -> None:
        _copy(root, folder, wanted)
        if not is_whole(folder):
            raise OSError(None, "the data set changed meanwhile; start again")

    _fill(target, build, is_whole)


def _contents(root: str, parts: Sequence[str]) -> _Contents:
    found: _Contents = {}

    def visit(name: str, parents: frozenset[str]) -> None:
        path = os.path.join(root, name)
        try:
            if not os.path.isdir(path):
                stat = os.stat(path)
                found[os.path.normpath(name)] = stat.st_size, int(stat.st_mtime)
                return
            here = os.path.realpath(path)
            inside = [] if here in parents else sorted(os.listdir(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        for entry in inside:
            if not entry.startswith("."):
                visit(os.path.join(name, entry), parents | {here})

    for part in parts:
        visit(part, frozenset())
    return found


def _copy(root: str, target: str, wanted: _Contents) -> None:
    total, room = sum(size for size, _ in wanted.values()), shutil.disk_usage(target).free
    if total > room:
        raise OSError(None, f"it has {total:,} bytes and {room:,} are free there; give another folder or make room")
    names = list(wanted)
    for folder in {os.path.dirname(name) for name in names}:
        os.makedirs(os.path.join(target, folder), exist_ok=True)

    def copy(chunk: list[str]) -> int:
        for name in chunk:
            shutil.copyfile(os.path.join(root, name), os.path.join(target, name))
            second = wanted[name][1]
            os.utime(os.path.join(target, name), (second, second))
        return sum(wanted[name][0] for name in chunk)

    chunks = [names[low : low + _CHUNK] for low in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool, progress("copying to data.stage_to", total, "B") as bar:
        for size in pool.map(copy, chunks):  # raises the first error, and cancels the copies that have not begun
            bar.update(size)
