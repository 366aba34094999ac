"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` over any agent and data set; studies of runs."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from dcl_lightning._version import __version__
from dcl_lightning.cli.messages import shortened
from dcl_lightning.errors import CheckpointError, ConfigurationError, DataError, HorovodNotFoundError, suggestion
from dcl_lightning.paths import expanded
from dcl_lightning.screen import EXPECTED_WARNINGS, ignore_warnings, tolerant

__all__ = ["main"]

_USER_ERRORS = (CheckpointError, ConfigurationError, DataError, HorovodNotFoundError)
_LIGHTNING = ("fit", "validate", "test", "predict")
# The other commands, by the module that has their ``main``.
COMMANDS = {
    "compare": "studies.compare",
    "report": "studies.report",
    "repeat": "studies.repeat",
    "sweep": "studies.sweep",
    "cite": "cli.cite",
    "data": "cli.datasets",
    "new": "cli.new",
    "run": "cli.supervisor",
    "profile": "cli.profile",
}
_DESCRIPTION = """Distributed continual learning: one fit runs a whole stream of tasks, as in
`fit --model nil --data.dataset digits --data.increment 2`. Studies of several runs: `compare RUN RUN ...`,
`repeat CONFIG --seeds 0..4`, `sweep CONFIG`, each with its own --help. `report RUN...` prints their results and with
`--html FILE` writes a page of them. `run --max-restarts 3 -- fit ...` restarts a lost job from its latest checkpoint.
`profile -- fit ...` shows where the time of a step goes. `data` lists the data sets and where they are.
`new agent|experiment NAME` writes a project that runs. `cite --model NAME --data.dataset NAME` prints BibTeX."""
# Lightning's messages about what is normal here.
_OUTSIDE_OF_SLURM = "The `srun` command is available"  # where SLURM is installed, and this is none of its jobs
_EXPECTED_NOTICES = ("Tip:", "TPU available", "`Trainer.fit` stopped: `max_epochs=")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments after the program's name; those of the process if None.

    Returns:
        Exit code: 0 done, 2 wrong usage, configuration, data or checkpoint, 130 after Ctrl-C, 143 after SIGTERM.
        Anything else raises.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given and given[0] in ("--version", "-V"):
        print(f"dcl_lightning {__version__}")
        return 0
    commands = (*_LIGHTNING, *COMMANDS)
    if given and not given[0].startswith("-") and given[0] not in commands:
        near = suggestion(given[0], commands)
        print(f"error: {given[0]}: no such command, give one of {', '.join(commands)}{near}", file=sys.stderr)
        return 2
    ignore_warnings(EXPECTED_WARNINGS if "SLURM_JOB_ID" in os.environ else [*EXPECTED_WARNINGS, _OUTSIDE_OF_SLURM])
    notices = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    notices.addFilter(_is_no_tip)
    if args is None:  # as `python -m` has it: classes of files in the working folder go by their names
        sys.path.append(os.getcwd())
    with tolerant("stderr"):
        try:
            if given and given[0] in COMMANDS:
                return int(importlib.import_module(f"dcl_lightning.{COMMANDS[given[0]]}").main(expanded(given[1:])))
            # The other commands do not need it, which takes seconds to import.
            program = importlib.import_module("dcl_lightning.cli.program")
            program.run_program(None if args is None else given, description=_DESCRIPTION)
        except Exception as error:
            reason = _user_error(error)
            if reason is None:
                raise
            print(f"error: {shortened(reason)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return _interrupted(given)
        except _of_lightning("SIGTERMException"):
            return 143
        except SystemExit as end:
            # Lightning ends with 1 after Ctrl-C; scripts expect the shell's code.
            if isinstance(end.__context__, KeyboardInterrupt):
                return _interrupted(given)
            raise
    return 0


def _interrupted(given: Sequence[str]) -> int:
    if given[:1] == ["fit"]:
        print("interrupted: the same command with --ckpt_path last goes on from the last checkpoint", file=sys.stderr)
    return 130


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _EXPECTED_NOTICES)


def _of_lightning(name: str) -> tuple[type[BaseException], ...]:
    """Return one of Lightning's exceptions; none if nothing has imported Lightning, which takes seconds."""
    module = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return () if module is None else (vars(module)[name],)


def _user_error(error: BaseException | None) -> str | None:
    """Return the message of the user's error that this one is or came from; jsonargparse wraps constructors' errors."""
    while error is not None:
        if isinstance(error, (*_USER_ERRORS, *_of_lightning("MisconfigurationException"))):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
