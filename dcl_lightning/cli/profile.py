"""``dcl-lightning profile -- fit ...``: where the time of a training step goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from dcl_lightning.callbacks.step_profile import WARM_UP, StepProfile
from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.cli.program import ContinualCLI, run_program
from dcl_lightning.errors import ConfigurationError

__all__ = ["ProfilingCLI", "main"]


def main(args: Sequence[str]) -> int:
    """Run a few steps of two tasks, without loggers and checkpoints, and show where the time of a step goes.

    Args:
        args: that follow ``profile``.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: what follows is no fit, brings a profiler of its own, or has no step to measure.
    """
    parser = CommandParser("profile", description=__doc__, usage="profile [options] -- fit ...")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="Steps to measure, at most, after some more."
    )
    parser.add_argument("fit", nargs=argparse.REMAINDER, help="The fit, with its options: `fit ...`.")
    given = parser.parse_args(args)
    fit = given.fit[1:] if given.fit[:1] == ["--"] else given.fit
    if fit[:1] != ["fit"]:
        raise ConfigurationError(
            f"profile: it measures a fit, and got {' '.join(fit) or 'nothing'}: give profile -- fit ... (behind a "
            "launcher: horovodrun ... dcl-lightning profile -- fit ...)"
        )
    if given.steps < 1:
        raise ConfigurationError(f"profile: --steps={given.steps}: give 1 or more")
    run_program(fit, partial(ProfilingCLI, steps=given.steps))
    return 0


class ProfilingCLI(ContinualCLI):
    """The command line of a fit that ends after some steps of two tasks, and shows what a step takes.

    Args:
        steps: to measure, at least 1.
    """

    def __init__(self, *args: Any, steps: int, **kwargs: Any) -> None:
        self._steps = steps
        super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; refuse what the command sets itself.

        Raises:
            ConfigurationError: with the key.
        """
        super().parse_arguments(parser, args)
        for key in ("trainer.profiler", "trainer.fast_dev_run", "ckpt_path"):
            value = self.config[f"fit.{key}"]
            if value:
                name = value.class_path if isinstance(value, Namespace) else value
                raise ConfigurationError(
                    f"profile: {key}={name}: leave it out; profile sets the profiler and the length of the fit, which "
                    "begins anew"
                )
        # The last step is left out: it ends with the end of the task.
        self.config["fit.trainer.fast_dev_run"] = WARM_UP + self._steps + 1

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with the callback that measures."""
        self.trainer_defaults["callbacks"] = [StepProfile(self._steps)]
        return super().instantiate_trainer(**kwargs)
