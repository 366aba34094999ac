"""Output to a screen that may be closed, broken, or without Unicode."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

__all__ = ["Screen", "is_watched", "show", "tolerant"]


class Screen:
    """A text stream whose failures are its own: what cannot be shown is left out.

    Letters that the stream's encoding lacks become question marks. Once a write has failed, because the reader has
    gone or the disk is full, nothing more is written.

    Args:
        stream: any object with ``write``, or None where the process has none.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._broken = not hasattr(stream, "write")

    def write(self, text: str) -> int:
        """Write what can be written; return the length of the text."""
        if not self._broken:
            try:
                self.stream.write(text)
            except UnicodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                self._try(self.stream.write, text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):
                self._leave()
        return len(text)

    def flush(self) -> None:
        """Flush the stream if it can be."""
        if not self._broken and hasattr(self.stream, "flush"):
            self._try(self.stream.flush)

    def isatty(self) -> bool:
        """Return whether the stream says that it is a terminal."""
        with suppress(AttributeError, OSError, ValueError):
            return bool(self.stream.isatty())
        return False

    def _try(self, do: Any, *args: Any) -> None:
        try:
            do(*args)
        except (OSError, ValueError):
            self._leave()

    def _leave(self) -> None:
        self._broken = True
        # What is still buffered would fail again at the end of the process, and change its exit code.
        with suppress(AttributeError, OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def tolerant(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """Let a stream of the process fail without an exception.

    Args:
        name: of the stream.
    """
    before = getattr(sys, name)
    screen = Screen(before)
    setattr(sys, name, screen)
    try:
        yield
    finally:
        screen.flush()
        if getattr(sys, name) is screen:
            setattr(sys, name, before)


def show(text: str) -> None:
    """Print a line at once; never fail.

    Args:
        text: the line.
    """
    screen = Screen(sys.stdout)
    screen.write(f"{text}\n")
    screen.flush()


def is_watched() -> bool:
    """Return whether the output is a terminal or a notebook."""
    return Screen(sys.stdout).isatty() or "ipykernel" in sys.modules
