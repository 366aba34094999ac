"""``dcl-lightning new agent|experiment NAME``: a folder with a small project that runs as it is."""

from __future__ import annotations

import keyword
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.cli.new_files import AGENT, EXPERIMENT
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.paths import absolute

__all__ = ["main", "names_of"]

_IMPORTED = ("Any", "Batch", "F", "Tensor", "MLP")  # by the files of an agent
_WORD_BEGINS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def main(args: Sequence[str]) -> int:
    """Write the folder, and print what to type next.

    Args:
        args: that follow ``new``.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: a name that cannot be used, or a folder that exists or cannot be written.
    """
    parser = CommandParser("new", description=__doc__)
    parser.add_argument(
        "kind",
        choices=("agent", "experiment"),
        help="agent: a method of your own, its configuration and its test. experiment: a comparison of three agents.",
    )
    parser.add_argument("name", metavar="NAME", help="Of the agent's class, as in Smooth; or of the experiment.")
    given = parser.parse_args(args)
    name: str = given.name
    _check(given.kind, name)
    if given.kind == "agent":
        cls, folder = names_of(name)
        files = {_renamed(file, cls, folder): _renamed(text, cls, folder) for file, text in AGENT.items()}
        steps = [
            "python -m pytest",
            f"python -m dcl_lightning fit --model.help {folder}.{cls}",
            f"python -m dcl_lightning fit --config {folder}_digits.yaml",
        ]
    else:
        folder = name
        files = {file: text.replace("NAME", name) for file, text in EXPERIMENT.items()}
        steps = ["sh run.sh"]
    _write(folder, files)
    print("\n".join([f"{folder}/ has {', '.join(files)}. Next:", f"  cd {folder}", *(f"  {step}" for step in steps)]))
    return 0


def names_of(name: str) -> tuple[str, str]:
    """Return the names of an agent's class and of its module.

    >>> names_of("SmoothER"), names_of("smooth_er")
    (('SmoothER', 'smooth_er'), ('SmoothEr', 'smooth_er'))

    Args:
        name: in either form.
    """
    cls = name if name[0].isupper() else "".join(word[:1].upper() + word[1:] for word in name.split("_"))
    return cls, _WORD_BEGINS.sub("_", cls).lower()


def _check(kind: str, name: str) -> None:
    from dcl_lightning import agents

    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise ConfigurationError(f"new {kind}: {name!r}: give letters from A to Z, digits and _, with a letter first")
    cls, module = names_of(name) if kind == "agent" else (name, name)
    other = "give another name"
    if keyword.iskeyword(cls) or keyword.iskeyword(module):
        raise ConfigurationError(f"new {kind}: {name!r} is a word of Python: {other}")
    taken = {known.lower().replace("_", ""): known for known in (*agents.__all__, *agents.short_names.__all__)}
    found = taken.get(name.lower().replace("_", ""))
    if found:
        raise ConfigurationError(f"new {kind}: {name!r}: there is an agent {found!r}: {other}")
    if os.path.lexists(module):
        raise ConfigurationError(f"new {kind}: {absolute(module)} is there: {other}, or remove it")
    if kind == "agent" and (cls in _IMPORTED or _is_installed(module)):
        raise ConfigurationError(f"new agent: {name!r} would hide what the agent imports by this name: {other}")


def _is_installed(module: str) -> bool:
    """Return whether Python or a package has a module of this name, which one in the working folder would hide."""
    path = [place for place in sys.path if absolute(place or ".") != absolute(".")]
    spec = PathFinder.find_spec(module, path)
    return module in sys.stdlib_module_names or (spec is not None and spec.loader is not None)


def _renamed(text: str, cls: str, module: str) -> str:
    return re.sub("[Ff]ading", lambda found: cls if found[0] == "Fading" else module, text)


def _write(folder: str, files: Mapping[str, str]) -> None:
    """Write all files or none."""
    try:
        with TemporaryDirectory(dir=".", prefix=".new-") as place:
            draft = Path(place) / folder
            draft.mkdir()
            for file, text in files.items():
                (draft / file).write_text(text, encoding="utf-8")
            draft.rename(folder)
    except OSError as error:
        raise ConfigurationError(
            f"new: the folder {folder} cannot be written ({error.strerror}): change to another folder"
        ) from error
