"""Output to a terminal or file that may be closed, broken, or without Unicode."""

from __future__ import annotations

import builtins
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO

__all__ = ["EXPECTED_WARNINGS", "Screen", "ignore_warnings", "is_watched", "log_through", "show", "tolerant"]

# What Lightning warns of and what is normal here.
EXPECTED_WARNINGS = (
    r".*treespec, LeafSpec.*",  # between Lightning and torch
    r"Total length of `list` across ranks is zero.*",  # nothing to validate on
    r"Grad strides do not match bucket view strides.*",  # of 1x1 convolutions in channels_last: the same memory
    r".*is smaller than the logging interval.*",  # small tasks
    r".*It is recommended to use `self.log\('val/.*",  # the logged values are already those of all workers
)


class Screen:
    """A text stream whose writes never raise.

    Letters that the stream's encoding lacks become question marks. After a failed write, because the reader has exited
    or the disk is full, nothing more is written.

    Args:
        stream: any object with ``write``, or None in a process without one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self._broken = not hasattr(stream, "write")

    def write(self, text: str) -> int:
        """Write what can be written; return the length of the text."""
        if self.stream is not None and not self._broken:
            try:
                self.stream.write(text)
            except UnicodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                with self._closed_on_error():
                    self.stream.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):
                self._close()
        return len(text)

    def flush(self) -> None:
        """Flush the stream if it can be flushed."""
        if self.stream is not None and not self._broken:
            with self._closed_on_error(), suppress(AttributeError):
                self.stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(AttributeError, OSError, ValueError):
            return self.stream is not None and self.stream.isatty()
        return False

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            self._close()

    def _close(self) -> None:
        self._broken = True
        # Buffered text would fail again at the end of the process, and change its exit code.
        with suppress(AttributeError, OSError, ValueError):
            assert self.stream is not None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def tolerant(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """Replace a stream of the process by a ``Screen``, whose writes never raise."""
    before = vars(sys)[name]
    screen = Screen(before)
    setattr(sys, name, screen)
    try:
        yield
    finally:
        screen.flush()
        if vars(sys)[name] is screen:
            setattr(sys, name, before)


def show(text: str) -> None:
    """Print a line at once; never raise."""
    screen = Screen(sys.stdout)
    screen.write(f"{text}\n")
    screen.flush()


def is_watched() -> bool:
    """Return whether the output is a terminal or a notebook."""
    # IPython adds its own name to the builtins of what it runs; its kernel may be imported by anybody.
    return Screen(sys.stdout).isatty() or "get_ipython" in vars(builtins)


def log_through(stream: TextIO, names: Sequence[str]) -> Callable[[], None]:
    """Let loggers that write to a terminal write to another stream; return what undoes this.

    Args:
        stream: where to.
        names: of the loggers whose handlers are meant.
    """
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    streams = [h for h in handlers if isinstance(h, logging.StreamHandler) and Screen(h.stream).isatty()]
    before = [(handler, handler.setStream(stream)) for handler in streams]

    def undo() -> None:
        for handler, own in before:
            handler.setStream(own)

    return undo


def ignore_warnings(messages: Sequence[str]) -> Callable[[], None]:
    """Ignore warnings whose messages begin with one of these regular expressions; return what undoes this."""
    before = list(warnings.filters)
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
    added = [entry for entry in warnings.filters if entry not in before]

    def undo() -> None:
        warnings.filters = [entry for entry in warnings.filters if entry not in added]

    return undo
