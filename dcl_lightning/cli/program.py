"""``fit``, ``validate``, ``test`` and ``predict`` over any agent and data set."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from dcl_lightning._lightning import callbacks_of
from dcl_lightning._version import __version__
from dcl_lightning.callbacks import PredictionWriter
from dcl_lightning.cli.config_files import last_model, with_one_optimizer, without_other_agent
from dcl_lightning.cli.parser import ContinualParser, memory_help
from dcl_lightning.cli.resume_last import go_on_from_last
from dcl_lightning.cli.run_dir import OwnFolders, SaveConfig, check_place
from dcl_lightning.cli.safe_load import refuse_foreign_classes
from dcl_lightning.cli.values import of_lightning, refuse_no_checkpoint, refuse_nulls
from dcl_lightning.data.scenarios import MAX_SEED
from dcl_lightning.errors import ConfigurationError, whole_number
from dcl_lightning.paths import absolute, expanded
from dcl_lightning.screen import tolerant

__all__ = ["ContinualCLI"]

_LOGGER = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "runs", "name": "dcl"},
}


_HELP = {
    "model": "Agent by its short name, or a file with one. `--model.help NAME` lists its keys, `--model.KEY VALUE` "
    "sets one, `--model.backbone NAME` the network and `--model.rehearsal.KEY VALUE` the memory.",
    "data": "Data module, or a file with one. `--data.help` lists its keys, `--data.KEY VALUE` sets one; "
    "`--data.dataset NAME` is all that is needed.",
    "seed_everything": "Seed of all random numbers, or true for a random one.",
}


class ContinualCLI(LightningCLI):
    """LightningCLI with a default data module, linked sizes and short names."""

    _folders = OwnFolders()

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

    def _parse_ckpt_path(self) -> None:
        """Find the last checkpoint; take the agent from it only if none is given: Lightning's own lets it win."""
        subcommand = self.config["subcommand"]  # the attribute is set later
        refuse_nulls(self.config[subcommand])
        go_on_from_last(self.config[subcommand], subcommand == "fit")
        if self.config[subcommand].get("weights_only") is not False:  # else it may hold what only its user trusts
            refuse_no_checkpoint(self.config[subcommand].get("ckpt_path"))
        args = self._args if self._args is not None else sys.argv[1:]
        if not any(arg.startswith(("--model", "--config", "-c")) for arg in args):
            refuse_foreign_classes(self.config[subcommand].get("ckpt_path"))
            super()._parse_ckpt_path()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; drop what a configuration says of another agent or optimizer than those that follow it."""
        self._args: list[str] | None = args
        given = list(sys.argv[1:] if args is None else args)
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

    def instantiate_classes(self) -> None:
        """Build what is configured; what Lightning, torch or a missing package says of a value is a user's error."""
        with of_lightning():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer; unless the user brings a ``ModelCheckpoint``, keep the last state."""
        trainer_config = self._get(self.config_init, "trainer")
        callbacks = trainer_config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        wanted = trainer_config.get("enable_checkpointing") is not False and not trainer_config.get("fast_dev_run")
        if wanted and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            self.trainer_defaults.setdefault("callbacks", [ModelCheckpoint(save_last=True)])
        if self.subcommand == "predict" and not any(isinstance(c, BasePredictionWriter) for c in callbacks):
            self.trainer_defaults["callbacks"] = [*self.trainer_defaults.get("callbacks", []), PredictionWriter()]
        with of_lightning():
            trainer = super().instantiate_trainer(**kwargs)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._folders = OwnFolders(trainer.loggers)
        for logger in trainer.loggers:
            check_place(logger.save_dir, "trainer.logger.save_dir")
            check_place(getattr(logger, "root_dir", None), "trainer.logger.name")
        for saver in trainer.checkpoint_callbacks:
            check_place(getattr(saver, "dirpath", None), "trainer.callbacks.dirpath")
        if not trainer.loggers and self.subcommand == "fit":
            check_place(trainer.default_root_dir, "trainer.default_root_dir")
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; leave no folder behind if it was refused: Lightning's loggers and profilers write before set-up."""
        try:
            with tolerant("stdout"):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            callbacks = callbacks_of(self.trainer)
            if any(isinstance(c, SaveConfig) and c.accepted for c in callbacks):
                raise
            self._folders.remove()
            with of_lightning():
                raise error
