"""Waits for Horovod's operations by polling with short sleeps; Horovod's own wait keeps a core busy."""

from __future__ import annotations

import sys
import time
from types import FrameType
from typing import Any

from dcl_lightning.errors import ConfigurationError

__all__ = ["end_waits", "handle_waited_for", "is_within_wait", "poll_while_waiting"]

# A job of two workers on two cores that had other work, too, took 1.5 times as long without these sleeps.
_POLL_INTERVAL_S = 2e-5
_reason: str | None = None


def end_waits(reason: str | None) -> None:
    """Let whoever waits for an operation of Horovod's raise, since what is waited for will never come.

    Args:
        reason: the error's message; None lets operations be waited for again.
    """
    global _reason
    _reason = reason


def poll_while_waiting() -> None:
    """Let whoever waits for an operation of Horovod's sleep between polls, in Horovod's own functions too.

    Its ``synchronize`` asks in a loop that only yields the core. On a CPU that takes the core from what is waited for:
    from Horovod's thread, the memory's, and the other workers of the machine.
    """
    import horovod.torch as hvd
    from horovod.torch import mpi_ops

    end_waits(None)
    wait = mpi_ops.synchronize
    if wait.__code__.co_filename == __file__:
        return

    def synchronize(handle: int) -> Any:
        try:
            # Of another handle, one that was waited for before, Horovod's own function knows what to say.
            while handle in mpi_ops._handle_map and not mpi_ops.poll(handle) and _reason is None:
                time.sleep(_POLL_INTERVAL_S)
        finally:
            # Also where a signal ends the sleep with an exception: no operation is left behind.
            result = None if _reason is not None else wait(handle)
        if _reason is not None:
            raise ConfigurationError(_reason)
        return result

    mpi_ops.synchronize = hvd.synchronize = synchronize


def is_within_wait(frame: FrameType) -> bool:
    """Return whether a frame is one of Horovod's, or of a wait for it, which tells nobody where a worker stands."""
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package == "horovod" or frame.f_code.co_filename == __file__


def handle_waited_for(frame: FrameType) -> int | None:
    """Return the handle that a frame of a thread's stack waits for, -1 if it is not known; None if it does not wait."""
    code = frame.f_code
    mpi_ops = sys.modules.get("horovod.torch.mpi_ops")
    files = {__file__, getattr(mpi_ops, "__file__", None)}
    if code.co_name != "synchronize" or code.co_filename not in files:
        return None
    return int(frame.f_locals.get("handle", -1))
