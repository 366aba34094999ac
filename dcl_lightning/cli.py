"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` over any agent and data set."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

import dcl_lightning.agents.presets
import dcl_lightning.backbones.presets
from dcl_lightning.agents import ContinualAgent
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.errors import ConfigurationError, DataError, HorovodNotFoundError

__all__ = ["ContinualCLI", "main", "without_other_agent"]

_USER_ERRORS = (ConfigurationError, DataError, HorovodNotFoundError, MisconfigurationException)
# What says how a network is built and optimised, whichever agent trains it.
_SHARED_KEYS = {
    "backbone",
    "decay_biases_and_norms",
    "epochs_per_task",
    "gamma",
    "lr",
    "milestones",
    "momentum",
    "optimizer",
    "optimizer_reset",
    "scale_lr",
    "warmup_epochs",
    "weight_decay",
}
_LOGGER = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "runs", "name": "dcl"},
}


class _Parser(LightningArgumentParser):
    """A parser whose errors take two lines: what is wrong, and where help is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the first, telling part of the message and exit with code 2."""
        # A backend of plain union types lists every member's complaint, a line each: one line is kept for all.
        text = " ".join(str(message).split())
        if len(text) > 1500:
            text = text[:1500] + " ..."
        print(f"error: {text}\nsee `{os.path.basename(sys.argv[0])} fit --help`", file=sys.stderr)
        sys.exit(2)


class ContinualCLI(LightningCLI):
    """LightningCLI with a default data module, linked sizes and short names."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser with short errors."""
        kwargs.setdefault("dump_header", [f"dcl_lightning {dcl_lightning.__version__}"])
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="YAML file; what stands later wins.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set our defaults and give the agent the sizes that the data module knows."""
        parser.set_defaults(
            {
                "model": {
                    "class_path": "dcl_lightning.agents.presets.base",
                    "init_args": {"backbone": "mlp"},
                },
                "data": {"class_path": "dcl_lightning.data.datamodule.ContinualDataModule"},
                "trainer.max_epochs": -1,
                "trainer.logger": _LOGGER,
                "trainer.num_sanity_val_steps": 0,
            }
        )
        for name in ("num_classes", "input_spec"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Take the agent from the checkpoint only if none is given: Lightning's own lets the checkpoint's win."""
        args = self._args if self._args is not None else sys.argv[1:]
        if not any(arg.startswith(("--model", "--config", "-c")) for arg in args):
            super()._parse_ckpt_path()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; where ``--model NAME`` follows a configuration of another agent, drop that agent's own values."""
        self._args: list[str] | None = args
        given = list(sys.argv[1:] if args is None else args)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, without_other_agent(given))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build the trainer; unless the user brings a ``ModelCheckpoint``, keep the last state."""
        trainer_config = self._get(self.config_init, "trainer")
        callbacks = trainer_config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        wanted = trainer_config.get("enable_checkpointing") is not False
        if wanted and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            self.trainer_defaults.setdefault("callbacks", [ModelCheckpoint(save_last=True)])
        return super().instantiate_trainer(**kwargs)


def without_other_agent(args: list[str]) -> list[str]:
    """Return the arguments with what belonged to another agent taken out of configuration files.

    After ``--config icarl.yaml --model base`` the parser would keep every old value that the new class
    accepts. Only the backbone and how it is optimised are kept; what is dropped is said.

    Args:
        args: arguments of the command line.
    """
    result = list(args)
    named = [i for i, arg in enumerate(args) if arg == "--model" or arg.startswith("--model=")]
    if not named:
        return result
    at = named[-1]
    name = args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
    for i, arg in enumerate(args[:at]):
        flag, _, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            continue
        place = i if value else i + 1
        text = _kept_config(value or args[place], name)
        if text is not None:
            result[place] = f"{flag}={text}" if value else text
    return result


def _kept_config(path: str, name: str) -> str | None:
    """Return the file's content less what belonged to another agent than ``name``; None if nothing did."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or str(model.get("class_path")).split(".")[-1] == name.split(".")[-1]:
        return None
    values = model.get("init_args") or {}
    dropped = sorted(set(values) - _SHARED_KEYS)
    if dropped:
        print(
            f"{path}: model.{', model.'.join(dropped)} belonged to {model['class_path']} and are dropped",
            file=sys.stderr,
        )
    config["model"] = {"class_path": name, "init_args": {k: v for k, v in values.items() if k in _SHARED_KEYS}}
    return yaml.safe_dump(config, sort_keys=False)


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments after the program's name; those of the process if None.

    Returns:
        Exit code: 0 done, 2 wrong usage, configuration or data, 130 after Ctrl-C, 143 after SIGTERM. Anything else
        raises.
    """
    _quieten()
    try:
        ContinualCLI(
            ContinualAgent,
            ContinualDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except Exception as error:
        told = _user_error(error)
        if told is None:
            raise
        print(f"error: {' '.join(str(told).split())}", file=sys.stderr)
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


def _user_error(error: BaseException | None) -> BaseException | None:
    """Return the error of ours that this one is or came from; jsonargparse wraps those of constructors."""
    while error is not None and not isinstance(error, _USER_ERRORS):
        error = error.__cause__ or error.__context__
    return error
