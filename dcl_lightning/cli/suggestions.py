"""Error messages of the command line: one line, with the nearest valid word."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dcl_lightning.errors import suggestion

__all__ = ["CommandParser", "cut", "in_one_line"]


_KEY = re.compile(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)")
_UNKNOWN = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
_PARSER_KEY = re.compile(r'Parser key "([\w.]+)": (.*)', re.DOTALL)
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_TYPES = re.compile(r"Subtypes: \[(.*?)\] Errors:")
_VALUE = re.compile(r"(?:Got|Given) value: (.*)$", re.DOTALL)
_FILE = re.compile(r"File does not exist: '([^']*)'")
_LONGEST = 700
# What other programs call our keys.
_ELSEWHERE = {
    "learning_rate": "lr",
    "memory_size": "buffer_size",
    "max_epochs": "epochs_per_task",
    "num_epochs": "epochs_per_task",
    "train_batch_size": "batch_size",
    "data_dir": "root",
}


def in_one_line(
    message: str, args: Sequence[str], keys: Sequence[str], options: Sequence[str], names: Sequence[str]
) -> str:
    """Return a parser's message as one line that says what was given, what is allowed and what was meant.

    Args:
        message: the parser's, which can be a line for each member of a union type.
        args: arguments of the command line, to name the whole flag.
        keys: keys that agents, backbones and data modules take.
        options: flags that the parser takes.
        names: short names and class names that can stand for a value.
    """
    return cut(_in_one_line(" ".join(message.split()), args, keys, options, names))


def cut(text: str) -> str:
    """Return a text as one line of readable length in which what cannot be shown is escaped.

    Args:
        text: may quote what a user gave, whatever that is.
    """
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    if len(shown) <= _LONGEST:
        return shown
    half = (_LONGEST - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def _in_one_line(
    text: str, args: Sequence[str], keys: Sequence[str], options: Sequence[str], names: Sequence[str]
) -> str:
    if found := _KEY.search(text):
        return f"{_flag(found[1], args)}: no such key{_nearest_key(found[1].rpartition('.')[2], keys)}"
    if found := _UNKNOWN.search(text):
        return f"{found[1]}: no such option{suggestion(found[1], options)}"
    if found := _CHOICE.search(text):
        choices = [word.strip(" '\"") for word in found[2].split(",")]
        return f"{found[1]}: give one of {', '.join(choices)}{suggestion(found[1], choices)}"
    if found := _FILE.search(text):
        path = Path(found[1])
        near = suggestion(path.name, sorted(os.listdir(path.parent)) if path.parent.is_dir() else [])
        return f"no file {path}{near}"
    if found := _PARSER_KEY.search(text):
        return _of_value(_flag(found[1], args), found[2], names)
    return text


def _of_value(flag: str, complaint: str, names: Sequence[str]) -> str:
    value = _VALUE.search(complaint)
    if found := _LITERAL.search(complaint):
        choices = [word.strip(" '\"") for word in found[1].split(",")]
        word = value[1].strip() if value else ""
        return f"{flag}={word}: give one of {', '.join(choices)}{suggestion(word, choices)}"
    if found := _CLASS.search(complaint):
        near = suggestion(found[1], names)
        return f"{flag}={found[1]}: no such name and no class path{near}; `{flag}.help NAME` tells of one"
    if (found := _TYPES.search(complaint)) and value:
        types = found[1].replace("<class '", "").replace("'>", "").replace("NoneType", "null")
        return f"{flag}={value[1]}: give {' or '.join(types.split(', '))}"
    if value and (found := re.search(r"Expected an? <class '(\w+)'>", complaint)):
        return f"{flag}={value[1]}: give {found[1]}"
    return f"{flag}: {complaint}"


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    found = suggestion(key, keys)
    near = "" if found else suggestion(key, _ELSEWHERE) or f"'{key}'"
    for word, ours in _ELSEWHERE.items():
        if f"'{word}'" in near:
            return f"; did you mean '{ours}'?"
    return found


def _flag(key: str, args: Sequence[str]) -> str:
    """Return the flag that set a key, of which the parser names the last part only; the key if a file did."""
    for arg in args:
        flag = arg.partition("=")[0].rstrip("+")
        if flag.startswith("--") and (flag[2:] == key or flag.endswith("." + key)):
            return flag
    return key


class CommandParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, without the usage, and an option without its value is one."""

    # argparse declares overloads for namespaces of any class, of which these commands use one.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; refuse ``--`` as a value, of which Python before 3.13 makes an empty list."""
        found, more = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return found, more

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with code 2."""
        print(f"error: {cut(f'{self.prog}: {message}')}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)
