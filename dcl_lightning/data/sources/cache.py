"""Arrays that are built once from a data set's files, and memory-mapped from then on."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from dcl_lightning.errors import DataError
from dcl_lightning.paths import absolute

__all__ = ["VARIABLE", "NoRoomError", "cached", "fill", "fingerprint", "mapped", "one_at_a_time", "write_array"]

VARIABLE = "DCL_LIGHTNING_CACHE"
_log = logging.getLogger(__name__)


class NoRoomError(DataError):
    """There is no place for a cache."""


def fingerprint(*words: object) -> str:
    """Return 12 hexadecimal digits that tell contents apart.

    Args:
        *words: anything with a telling ``str``.
    """
    digest = hashlib.sha256()
    for word in words:
        digest.update(str(word).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:12]


def cached(folder: str, name: str, mark: str, build: Callable[[str], None]) -> str:
    """Return a folder that ``build`` has filled, now or in an earlier run.

    It lies in ``.dcl_lightning`` beside the data, or where that can't be written, in the user's cache folder; the
    environment variable ``DCL_LIGHTNING_CACHE`` names another place. It is filled under another name and moved when
    it is complete, by one process at a time.

    Args:
        folder: folder of the data set.
        name: what is cached.
        mark: fingerprint of what it is made from.
        build: fills the empty folder that it is given.

    Raises:
        NoRoomError: no place can be written.
        Exception: what ``build`` raises.
    """
    given = os.environ.get(VARIABLE) and absolute(os.environ[VARIABLE])
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dcl_lightning")
    away = f"{name}-{mark}-{fingerprint(os.path.realpath(folder))}"
    beside = os.path.join(folder, ".dcl_lightning", f"{name}-{mark}")
    targets = [os.path.join(given, away)] if given else [beside, os.path.join(home, away)]
    for target in targets:
        if os.path.isdir(target):
            return target
    reasons = []
    for target in targets:
        try:
            fill(target, build)
        except OSError as error:
            reasons.append(f"{os.path.dirname(target)} ({error.strerror})")
        else:
            return target
    raise NoRoomError(
        f"data set '{name}' has to be written once in another form, and none of these places takes it: "
        f"{', '.join(reasons)}; set the environment variable {VARIABLE} to a folder with room"
    )


def mapped(where: str, name: str) -> np.ndarray:
    """Return an array of a cache, mapped into memory.

    Args:
        where: folder of the cache.
        name: the array's, without ``.npy``.
    """
    # Copy-on-write, since torch warns of arrays that it must not write to; nothing is ever written.
    array: np.ndarray = np.load(os.path.join(where, f"{name}.npy"), mmap_mode="c")
    return array


def write_array(where: str, name: str, array: np.ndarray) -> None:
    """Write an array into a cache, down to the disk: mapped, a cut-off file kills the process.

    Args:
        where: folder of the cache.
        name: the array's, without ``.npy``.
        array: what is written.
    """
    with open(os.path.join(where, f"{name}.npy"), "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def fill(target: str, build: Callable[[str], None], whole: Callable[[str], bool] = os.path.isdir) -> None:
    """Let ``build`` fill a folder under another name, then give it its own; one process at a time, the others wait.

    Args:
        target: the folder; one that is not whole any more is replaced.
        build: fills the empty folder that it is given.
        whole: whether the folder is there already.

    Raises:
        OSError: it cannot be written.
        Exception: what ``build`` raises.
    """
    parent, name = os.path.split(target)
    os.makedirs(parent, exist_ok=True)
    with one_at_a_time(os.path.join(parent, f".{name}.lock")) as alone:
        if whole(target):
            return
        if alone:
            # Nobody else is writing: what a killed process left.
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
            if not (isinstance(error, OSError) and whole(target)):
                raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(path: str) -> Iterator[bool]:
    """Hold a lock among processes while the block runs; yield whether the file system has locks.

    Args:
        path: the lock's file, made if it is not there.
    """
    import fcntl

    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks: then the work is done twice, and the last to end is dropped.
            yield False
        else:
            yield True
