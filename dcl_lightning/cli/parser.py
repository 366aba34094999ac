"""The parser: help that can be read to its end, and mistakes in one line."""

from __future__ import annotations

import inspect
import os
import sys
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, ClassVar, NoReturn, get_args, get_type_hints

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

import dcl_lightning.agents.short_names
import dcl_lightning.backbones.short_names
from dcl_lightning.agents import ContinualAgent
from dcl_lightning.backbones import Backbone
from dcl_lightning.cli.suggestions import in_one_line
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.errors import ConfigurationError, suggestion
from dcl_lightning.memory.config import MemorySize, RehearsalConfig

__all__ = ["AGENTS", "BACKBONES", "ContinualParser", "HelpFormatter", "memory_help"]

AGENTS = tuple(dcl_lightning.agents.short_names.__all__)
BACKBONES = tuple(dcl_lightning.backbones.short_names.__all__)


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, but where a class can be chosen it lists our short names, or bare class names.

    jsonargparse lists the class paths of all subclasses that are imported: four hundred for a backbone.
    """

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        extra = getattr(action, "extra_help", str)()
        if not extra:
            return text
        paths = extra.partition(": ")[2].split(", ")
        short = [path.rpartition(".")[2] for path in paths if ".backbones.short_names." in path]
        short = short or [path.rpartition(".")[2] for path in paths if ".short_names." in path]
        if short:
            return text.replace(extra, f"; short names: {', '.join(sorted(short))}; or any class path")
        return text.replace(extra, f"; classes: {', '.join(path.rpartition('.')[2] for path in paths)}")


class ContinualParser(LightningArgumentParser):
    """A parser whose errors take two lines: what is wrong, and where help is."""

    # Arguments that are being parsed, for messages that name the whole flag; jsonargparse makes further parsers of this
    # class for what is nested, and they complain, too.
    given: ClassVar[Sequence[str]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong with the nearest right word, and exit with code 2."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        text = in_one_line(str(message), self.given, _keys(), options, [*AGENTS, *BACKBONES, *_class_names()])
        program = os.path.basename(sys.argv[0])
        print(f"error: {text}\nsee `{program} fit --help`, `{program} fit --model.help NAME`", file=sys.stderr)
        sys.exit(2)


def _keys() -> list[str]:
    """Return the keys that agents, backbones, memories and data modules take."""
    classes: list[Any] = [ContinualDataModule, RehearsalConfig, MemorySize]
    classes += [*_subclasses(ContinualAgent), *_subclasses(Backbone)]
    names = {name for kind in classes for name in inspect.signature(kind).parameters}
    return sorted(names - {"args", "kwargs"})


def _class_names() -> list[str]:
    kinds = [*_subclasses(ContinualAgent), *_subclasses(Backbone), *_subclasses(Callback), *_subclasses(Logger)]
    return sorted({kind.__name__ for kind in kinds})


def _subclasses(kind: Any) -> Iterator[Any]:
    yield kind
    for below in kind.__subclasses__():
        yield from _subclasses(below)


def memory_help(agent: str) -> str:
    """Return the help of the keys below ``--model.rehearsal``, with the agent's own values as defaults.

    jsonargparse cannot show what is nested that deep.

    Args:
        agent: short name.

    Raises:
        ConfigurationError: no such agent, or one without a memory.
    """
    kind = getattr(dcl_lightning.agents.short_names, agent, None) if agent in AGENTS else None
    if kind is None:
        raise ConfigurationError(f"--model={agent}: give one of {', '.join(AGENTS)}{suggestion(agent, AGENTS)}")
    for base in kind.__mro__:
        hint = get_type_hints(base.__init__).get("rehearsal") if "__init__" in vars(base) else None
        config = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        if config is not None:
            usage = f"fit --model {agent} [--model.rehearsal.KEY VALUE ...]"
            parser = ContinualParser(usage=usage, description=f"Memory of agent {agent}.", add_help=False)
            parser.add_class_arguments(config, "model.rehearsal")
            own = getattr(kind, "memory", MemorySize()).explicit
            parser.set_defaults({f"model.rehearsal.{key}": value for key, value in own.items()})
            return parser.format_help()
    raise ConfigurationError(f"agent {agent} has no memory, and so no keys below --model.rehearsal")
