"""Error messages of the command line: one line, with the nearest valid word."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from dcl_lightning.errors import ConfigurationError, suggestion

__all__ = ["CommandParser", "in_one_line", "library_errors_as_ours", "shortened"]

_KEY = re.compile(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)")
_UNKNOWN = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
_PARSER_KEY = re.compile(r'Parser key "([\w.]+)": (.*)', re.DOTALL)
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_TYPES = re.compile(r"Subtypes: \[(.*?)\] Errors:")
_VALUE = re.compile(r"(?:Got|Given) value: (.*)$", re.DOTALL)
_TYPE = re.compile(r"Expected an? <class '(\w+)'>")
_AGENT = "dcl_lightning.agents.base.ContinualAgent"
_FILE = re.compile(r"File does not exist: '([^']*)'")
_LONGEST = 700
# Other programs' names of our keys.
_ELSEWHERE = {
    "learning_rate": "lr",
    "memory_size": "buffer_size",
    "max_epochs": "epochs_per_task",
    "num_epochs": "epochs_per_task",
    "train_batch_size": "batch_size",
    "data_dir": "root",
}
# Packages whose own messages say what is wrong with a value.
_LIBRARIES = ("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "torch", "torchmetrics")


def in_one_line(
    message: str, args: Sequence[str], keys: Sequence[str], options: Sequence[str], names: Sequence[str]
) -> str:
    """Return a parser's message as one line that says what was given, what is allowed and what was meant.

    Args:
        message: the parser's, which can have a line for each member of a union type.
        args: arguments of the command line, to name the whole flag.
        keys: keys that agents, backbones and data modules take.
        options: flags that the parser takes.
        names: short names and class names that can stand for a value.
    """
    text = " ".join(message.split())
    if found := _KEY.search(text):
        text = f"{_flag(found[1], args)}: no such key{_nearest_key(found[1].rpartition('.')[2], keys)}"
    elif found := _UNKNOWN.search(text):
        text = f"{found[1]}: no such option{suggestion(found[1], options)}"
    elif found := _CHOICE.search(text):
        text = f"{found[1]}: {_one_of(found[2], found[1])}"
    elif found := _FILE.search(text):
        path = Path(found[1])
        near = suggestion(path.name, sorted(os.listdir(path.parent)) if path.parent.is_dir() else [])
        text = f"no file {path}{near}"
    elif found := _PARSER_KEY.search(text):
        text = _of_value(_flag(found[1], args), found[2], names)
    return shortened(text)


def shortened(text: str) -> str:
    """Return a text as one line of readable length, with unprintable characters escaped."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    if len(shown) <= _LONGEST:
        return shown
    half = (_LONGEST - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def _of_value(flag: str, complaint: str, names: Sequence[str]) -> str:
    given = _VALUE.search(complaint)
    if found := _LITERAL.search(complaint):
        word = given[1].strip() if given else ""
        return f"{flag}={word}: {_one_of(found[1], word)}"
    if found := _CLASS.search(complaint):
        near = suggestion(found[1], names)
        return f"{flag}={found[1]}: no such name and no class path{near}; `{flag}.help NAME` shows its keys"
    if given and _AGENT in complaint:
        return (
            f"{flag}={given[1]}: no agent; give the name of one or a subclass of dcl_lightning.ContinualAgent. Any "
            "other LightningModule gets dcl_lightning.Rehearsal in a command line of its own (docs/guides/embedding.md)"
        )
    if given and (found := _TYPES.search(complaint)):
        types = found[1].replace("<class '", "").replace("'>", "").replace("NoneType", "null")
        return f"{flag}={given[1]}: give {' or '.join(types.split(', '))}"
    if given and (found := _TYPE.search(complaint)):
        return f"{flag}={given[1]}: give {found[1]}"
    return f"{flag}: {complaint}"


def _one_of(choices: str, given: str) -> str:
    words = [word.strip(" '\"") for word in choices.split(",")]
    return f"give one of {', '.join(words)}{suggestion(given, words)}"


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    found = suggestion(key, keys)
    near = "" if found else suggestion(key, _ELSEWHERE) or f"'{key}'"
    for word, ours in _ELSEWHERE.items():
        if f"'{word}'" in near:
            return f"; did you mean '{ours}'?"
    return found


def _flag(key: str, args: Sequence[str]) -> str:
    """Return the flag that set a key, of which the parser names only the last part; the key if a file set it."""
    for arg in args:
        flag = arg.partition("=")[0].rstrip("+")
        if flag.startswith("--") and (flag[2:] == key or flag.endswith("." + key)):
            return flag
    return key


@contextmanager
def library_errors_as_ours() -> Iterator[None]:
    """Raise a missing package, and a value that Lightning or torch refuses, as a user's error.

    Raises:
        ConfigurationError: with the library's own message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f": pip install {error.name}" if error.name else ""
        raise ConfigurationError(f"{error}{remedy}") from error
    except (OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        innermost: BaseException = error
        while innermost.__cause__ is not None and not isinstance(innermost, ConfigurationError):
            innermost = innermost.__cause__
        if _raised_in(innermost).partition(".")[0] in _LIBRARIES:
            raise ConfigurationError(_with_nearest_name(str(innermost)) or repr(innermost)) from error
        raise


def _with_nearest_name(message: str) -> str:
    """Return Lightning's message on an unknown accelerator or strategy as ours, with the nearest name."""
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    found = re.search(r"`(accelerator|strategy)='([^']*)'`", message)
    if found is None:
        return message
    if found[1] == "accelerator":
        names = listed = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    else:
        names = StrategyRegistry.available_strategies()
        listed = [name for name in ("auto", "ddp", "horovod", "fsdp2") if name in ("auto", *names)]
    return f"trainer.{found[1]}={found[2]}: give {', '.join(listed)} or a class path{suggestion(found[2], names)}"


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an exception."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module


class CommandParser(argparse.ArgumentParser):
    """argparse's parser with errors of one line; an option without its value is an error."""

    # argparse declares overloads for namespaces of any class, of which these commands use one.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; refuse ``--`` as a value, which Python before 3.13 reads as an empty list."""
        found, more = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.nargs is None and vars(found).get(action.dest) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return found, more

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with code 2."""
        print(f"error: {shortened(f'{self.prog}: {message}')}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)
