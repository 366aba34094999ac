"""``fit``, ``validate``, ``test`` and ``predict`` over any agent and data set: Lightning's CLI, and its parser."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from argparse import Action
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any, ClassVar, NoReturn, get_args, get_type_hints

import lightning.pytorch as pl
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, ModelSummary, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import dcl_lightning.agents.short_names
import dcl_lightning.backbones.short_names
from dcl_lightning._lightning import callbacks_of, set_callbacks
from dcl_lightning._version import __version__
from dcl_lightning.agents import ContinualAgent
from dcl_lightning.agents.strategies import refuse_name
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.backbones import Backbone
from dcl_lightning.callbacks import PredictionWriter
from dcl_lightning.callbacks.progress import StreamBar
from dcl_lightning.cli.checkpoint_path import refuse_foreign_classes, refuse_missing_checkpoint, resume_last
from dcl_lightning.cli.config_files import last_model, refuse_nulls, with_one_optimizer, without_other_agent
from dcl_lightning.cli.messages import in_one_line, library_errors_as_ours
from dcl_lightning.cli.run_dir import OwnFolders, SaveConfig, check_place
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.data.scenarios import MAX_SEED
from dcl_lightning.errors import ConfigurationError, suggestion, whole_number
from dcl_lightning.memory.config import MemorySize, RehearsalConfig
from dcl_lightning.paths import absolute, expanded
from dcl_lightning.report.text import SAMPLES, evaluation_text
from dcl_lightning.screen import show, tolerant

__all__ = ["AGENTS", "BACKBONES", "ContinualCLI", "ContinualParser", "HelpFormatter", "memory_help", "run_program"]

AGENTS = tuple(dcl_lightning.agents.short_names.__all__)
BACKBONES = tuple(dcl_lightning.backbones.short_names.__all__)
_LOGGER = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "runs", "name": "dcl"},
}
_UPDATES_PER_SECOND = 10  # of a terminal
_PREFIXES = {"test": "test", "validate": "val"}  # of what commands log
_HELP = {
    "model": "Agent by its short name, or a file with one. `--model.help NAME` lists its keys, `--model.KEY VALUE` "
    "sets one, `--model.backbone NAME` the network and `--model.rehearsal.KEY VALUE` the memory.",
    "data": "Data module, or a file with one. `--data.help` lists its keys, `--data.KEY VALUE` sets one; "
    "`--data.dataset NAME` is all that is needed.",
    "seed_everything": "Seed of all random numbers, or true for a random one.",
}


def run_program(
    args: Sequence[str] | None, kind: Callable[..., ContinualCLI] | None = None, description: str | None = None
) -> None:
    """Run a command line.

    Args:
        args: from the subcommand on; those of the process if None.
        kind: its class, or what makes one; ``ContinualCLI`` if None.
        description: shown by ``--help``.
    """
    (kind or ContinualCLI)(
        ContinualAgent,
        ContinualDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        parser_kwargs={"description": description},
        args=None if args is None else list(args),
    )


class ContinualCLI(LightningCLI):
    """LightningCLI with a default data module, linked sizes and short names."""

    _folders = OwnFolders()
    _given: list[str]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser with short errors."""
        kwargs.setdefault("dump_header", [f"dcl_lightning {__version__}"])
        parser = ContinualParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="YAML file; what stands later wins.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set our defaults and give the agent the sizes that the data module knows."""
        parser.set_defaults(
            {
                "model": {
                    "class_path": "dcl_lightning.agents.short_names.base",
                    "init_args": {"backbone": "mlp"},
                },
                "data": {"class_path": "dcl_lightning.data.datamodule.ContinualDataModule"},
                "trainer.max_epochs": -1,
                "trainer.logger": _LOGGER,
                "trainer.num_sanity_val_steps": 0,
            }
        )
        for action in parser._actions:
            if action.dest in _HELP and not action.dest.endswith("help"):
                action.help = _HELP[action.dest]
        for name in ("num_classes", "input_spec"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leave Lightning's table of results out, which has a column of 17 digits for each task; ours is shown."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in _PREFIXES:
            parser.set_defaults(verbose=False)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; drop the values of a configuration file that belong to another agent or optimizer."""
        given = self._given = list(sys.argv[1:] if args is None else map(str, args))
        absolute(".")  # the parser's own message would name another reason
        for arg in given:
            try:
                arg.encode()
            except UnicodeEncodeError as error:
                raise ConfigurationError(
                    f"{arg!r} is not UTF-8, which a configuration has to be: give a symbolic link of another name"
                ) from error
        if "--model.rehearsal.help" in given:
            print(memory_help(last_model(given) or "nil"))
            sys.exit(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            ContinualParser.given = given
            try:
                super().parse_arguments(parser, without_other_agent(with_one_optimizer(given)))
            except (OSError, RecursionError, UnicodeError) as error:
                raise ConfigurationError(
                    f"a configuration file cannot be read ({error}): give YAML in UTF-8 that does not refer to itself"
                ) from error
        self.config = expanded(self.config)
        seed = self.config.get(f"{self.config.get('subcommand')}.seed_everything")
        if not isinstance(seed, (bool, type(None))):  # True is a random one
            whole_number("seed_everything", seed, 0, MAX_SEED + 1)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint; take the agent from it only if none is given: Lightning's own prefers its values."""
        command = self.config["subcommand"]  # ``self.subcommand`` is set later
        config: Namespace = self.config[command]
        refuse_nulls(config)
        resume_last(config, command == "fit")
        if config.get("weights_only") is not False:  # else it may hold classes that only its user trusts
            refuse_missing_checkpoint(config.get("ckpt_path"))
        if not any(arg.startswith(("--model", "--config", "-c")) for arg in self._given):
            refuse_foreign_classes(config.get("ckpt_path"))
            super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        """Build what is configured; a value that Lightning or torch refuses is a user's error."""
        with library_errors_as_ours():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer; unless the user brings a ``ModelCheckpoint``, keep the last state."""
        trainer_config = self._get(self.config_init, "trainer")
        refuse_name(trainer_config.get("strategy"))
        callbacks = trainer_config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        wanted = trainer_config.get("enable_checkpointing") is not False and not trainer_config.get("fast_dev_run")
        if wanted and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            self.trainer_defaults.setdefault("callbacks", [ModelCheckpoint(save_last=True)])
        if self.subcommand == "predict" and not any(isinstance(c, BasePredictionWriter) for c in callbacks):
            self.trainer_defaults["callbacks"] = [*self.trainer_defaults.get("callbacks", []), PredictionWriter()]
        # Those that the user has not chosen; Lightning adds its own to the same list.
        replaced = [
            (kind, ours)
            for kind, ours in ((ModelSummary, NetworkLine), (RichProgressBar, partial(StreamBar, _UPDATES_PER_SECOND)))
            if not any(isinstance(c, kind) for c in callbacks)
        ]
        with library_errors_as_ours():
            trainer = super().instantiate_trainer(**kwargs)
        for kind, ours in replaced:
            set_callbacks(trainer, [ours() if isinstance(c, kind) else c for c in callbacks_of(trainer)])
        # Lightning keeps the rank as an undeclared attribute of this function.
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._folders = OwnFolders(trainer.loggers)
        for logger in trainer.loggers:
            check_place(logger.save_dir, "trainer.logger.save_dir")
            check_place(logger.root_dir, "trainer.logger.name")
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint):
                check_place(saver.dirpath, "trainer.callbacks.dirpath")
        if not trainer.loggers and self.subcommand == "fit":
            check_place(trainer.default_root_dir, "trainer.default_root_dir")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; remove the folders of a run that was refused: Lightning's loggers and profilers write before set-up."""
        try:
            with tolerant("stdout"):
                super()._run_subcommand(subcommand)
                if subcommand in _PREFIXES and self.trainer.is_global_zero:
                    on = self.datamodule.evaluate_on if subcommand == "test" else self.datamodule.validated_on
                    show(evaluation_text(self.trainer.callback_metrics, _PREFIXES[subcommand], SAMPLES[on]))
        except BaseException as error:
            if any(isinstance(c, SaveConfig) and c.accepted for c in callbacks_of(self.trainer)):
                raise
            self._folders.remove()
            with library_errors_as_ours():
                raise error


class NetworkLine(ModelSummary):
    """Prints one line in place of Lightning's table, in which a teacher's copy counts and operations are 0."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the backbone's name and the numbers of parameters."""
        sizes = {True: 0, False: 0}
        copies = {p for module in pl_module.modules() if isinstance(module, Teacher) for p in module.parameters()}
        for parameter in set(pl_module.parameters()) - copies:
            sizes[parameter.requires_grad] += parameter.numel()
        name = type(pl_module.backbone if isinstance(pl_module, ContinualAgent) else pl_module).__name__
        frozen = f", {sizes[False]:,} frozen" if sizes[False] else ""
        rank_zero_info(f"Network: {name}, {sizes[True]:,} trained parameters{frozen}")


class ContinualParser(LightningArgumentParser):
    """A parser whose errors take two lines: what is wrong, and where help is."""

    # Of the whole command line: jsonargparse makes further parsers of this class for nested values, and their errors
    # name the whole flag, too.
    given: ClassVar[Sequence[str]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong with the nearest valid word, and exit with code 2."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        kinds = [*_subclasses(ContinualAgent), *_subclasses(Backbone)]
        keys = {name for kind in (*kinds, *_WITH_KEYS) for name in inspect.signature(kind).parameters}
        named = {kind.__name__ for kind in (*kinds, *_subclasses(pl.Callback), *_subclasses(Logger))}
        names = [*AGENTS, *BACKBONES, *sorted(named)]
        text = in_one_line(str(message), self.given, sorted(keys - {"args", "kwargs"}), options, names)
        program = os.path.basename(sys.argv[0])
        print(f"error: {text}\nsee `{program} fit --help`, `{program} fit --model.help NAME`", file=sys.stderr)
        sys.exit(2)


_WITH_KEYS: tuple[type, ...] = (ContinualDataModule, RehearsalConfig, MemorySize)


def _subclasses(kind: type[object]) -> Iterator[type[object]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _subclasses(below)


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, but where a class can be chosen it lists our short names, or bare class names.

    jsonargparse lists the class paths of all imported subclasses: four hundred for a backbone.
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


def memory_help(agent: str) -> str:
    """Return the help of the keys below ``--model.rehearsal``, with the agent's own values as defaults.

    jsonargparse does not show keys that are nested that deep.

    Args:
        agent: short name.

    Raises:
        ConfigurationError: no such agent, or one without a memory.
    """
    if agent not in AGENTS:
        raise ConfigurationError(f"--model={agent}: give one of {', '.join(AGENTS)}{suggestion(agent, AGENTS)}")
    kind: type = vars(dcl_lightning.agents.short_names)[agent]
    for base in kind.__mro__:
        hint = get_type_hints(vars(base)["__init__"]).get("rehearsal") if "__init__" in vars(base) else None
        config = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        if config is not None:
            usage = f"fit --model {agent} [--model.rehearsal.KEY VALUE ...]"
            parser = ContinualParser(usage=usage, description=f"Memory of agent {agent}.", add_help=False)
            parser.add_class_arguments(config, "model.rehearsal")
            own = getattr(kind, "memory", MemorySize()).explicit
            parser.set_defaults({f"model.rehearsal.{key}": value for key, value in own.items()})
            return parser.format_help()
    raise ConfigurationError(f"agent {agent} has no memory, and so no keys below --model.rehearsal")
