"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` over any agent and data set; studies of runs."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dcl_lightning.cli.suggestions import cut
from dcl_lightning.errors import CheckpointError, ConfigurationError, DataError, HorovodNotFoundError
from dcl_lightning.paths import expanded
from dcl_lightning.screen import tolerant

__all__ = ["main"]

_USER_ERRORS = (CheckpointError, ConfigurationError, DataError, HorovodNotFoundError, MisconfigurationException)
# Commands besides those of Lightning, each in a module of its own.
COMMANDS = {
    "compare": "studies.compare",
    "repeat": "studies.repeat",
    "sweep": "studies.sweep",
    "cite": "cli.cite",
    "run": "cli.supervisor",
}
_DESCRIPTION = """Distributed continual learning: one fit runs a whole stream of tasks, as in
`fit --model nil --data.dataset digits --data.increment 2`. Studies of several runs: `compare RUN RUN ...`,
`repeat CONFIG --seeds 0..4`, `sweep CONFIG`, each with its own --help. `run --max-restarts 3 -- fit ...` starts a lost
job again from its newest checkpoint. `cite --model NAME --data.dataset NAME` prints BibTeX."""


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments after the program's name; those of the process if None.

    Returns:
        Exit code: 0 done, 2 wrong usage, configuration, data or checkpoint, 130 after Ctrl-C, 143 after SIGTERM.
        Anything else raises.
    """
    given = sys.argv[1:] if args is None else args
    _quieten()
    with tolerant("stderr"):
        try:
            if given and given[0] in COMMANDS:
                return int(importlib.import_module(f"dcl_lightning.{COMMANDS[given[0]]}").main(expanded(given[1:])))
            _run(args)
        except Exception as error:
            told = _user_error(error)
            if told is None:
                raise
            print(f"error: {cut(told)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        except SIGTERMException:
            return 143
        except SystemExit as end:
            # Lightning ends with 1 after Ctrl-C; scripts that wait for us tell it by the shell's own code.
            if isinstance(end.__context__, KeyboardInterrupt):
                return 130
            raise
    return 0


def _run(args: list[str] | None) -> None:
    # What the other commands do not need, and what takes seconds to import.
    from dcl_lightning.agents import ContinualAgent
    from dcl_lightning.cli.program import ContinualCLI
    from dcl_lightning.cli.run_dir import SaveConfig
    from dcl_lightning.data import ContinualDataModule

    ContinualCLI(
        ContinualAgent,
        ContinualDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        parser_kwargs={"description": _DESCRIPTION},
        args=args,
    )


def _quieten() -> None:
    """Leave out what Lightning says at every start and what is as it should be here."""
    for message in (
        r".*treespec, LeafSpec.*",  # between Lightning and torch
        r".*in eval mode at the start of training.*",  # a teacher is
        r".*is smaller than the logging interval.*",  # small tasks
        r".*It is recommended to use `self.log\('val/.*",  # what is logged is of all workers already
    ):
        warnings.filterwarnings("ignore", message=message)
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip:" not in record.getMessage() and "TPU available" not in record.getMessage())


def _user_error(error: BaseException | None) -> str | None:
    """Return the message of a user's error that this one is or came from; jsonargparse wraps constructors' errors."""
    while error is not None:
        if isinstance(error, _USER_ERRORS):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
