"""Mistyped commands, run in this process and judged: the material of the fuzz test."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from dcl_lightning import RehearsalConfig, cli
from dcl_lightning.cli.program import AGENTS, ContinualCLI

__all__ = ["AGENTS", "VALUES", "Outcome", "attempt", "leaf_keys", "quick", "refused"]

# Out of range, of the wrong type, empty, huge, not finite, not ASCII, not UTF-8, null, nested, not YAML.
VALUES = [
    *("-1", "0", "1", "2", "-0.5", "0.5", "1.5", "1e-300", "1e300", "99999999999999999999", "-99999999999999999999"),
    *("nan", "inf", "-inf", ".nan", "true", "false", "null", "", " ", "x", "é漢字\u202e", "\udc80", "y" * 5000),
    *("[]", "[1, 2]", "[-1]", "[0.5, nan]", "[null]", "[[1]]", "['a', 'b']", "{}", "{a: 1}", "{1: {2: 3}}"),
    *("{class_path: os.system}", "{class_path: }", "{init_args: 5}", "os.system", "torch.nn.Linear", "a.b"),
    *("[", "{", ": :", "- -", "\t", "'", "&a [*a]", "!!python/name:os.system", "1,2", "..", "no/such/file.yaml"),
]  # fmt: skip
# Small, and without the numbers of a machine's cores and cards.
QUICK = ["--data.dataset=synthetic", "--data.increment=5", "--trainer.accelerator=cpu", "--data.num_workers=0"]
QUICK += ["--trainer.logger.name=fuzz"]
LIMIT_S = 60


class Reached(Exception):
    """The command was accepted and has trained a step, or would start processes."""


class Hangs(BaseException):
    """The command takes too long."""


@dataclass
class Outcome:
    """What became of a command.

    Attributes:
        code: its exit code; 0 if it was accepted; None if an exception came out.
        err: what it wrote to the error stream, and the traceback of an exception.
        made: what is in its folder that was not there before.
    """

    args: list[str]
    code: int | None
    err: str
    made: list[str]

    @property
    def fault(self) -> str:
        """Return what is wrong with it in a few words; nothing if nothing is."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        if self.code not in (0, 2) or "Traceback" in self.err:
            return lines[-1] if lines else f"code {self.code}"
        if self.code == 0:
            return ""
        if not 1 <= len(lines) <= 3:
            return f"{len(lines)} lines: {lines[:5]}"
        if max(map(len, lines)) > 1000:
            return f"a line of {max(map(len, lines))} characters"
        return f"made {self.made}" if self.made else ""


@contextlib.contextmanager
def quick(parsers: dict[type, Any]) -> Iterator[None]:
    """Let commands end after one step, start no processes and share the parser, which takes most of their time.

    Args:
        parsers: made so far.
    """

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    make = ContinualCLI.setup_parser

    def setup_parser(self: ContinualCLI, *args: Any) -> None:
        if ContinualCLI not in parsers:
            make(self, *args)
            parsers[ContinualCLI] = {
                k: vars(self)[k] for k in ("parser", "_subcommand_method_arguments", "_subcommand_parsers")
            }
        vars(self).update(parsers[ContinualCLI])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_TrainingEpochLoop, "on_advance_end", reached)
        for launcher in (_MultiProcessingLauncher, _SubprocessScriptLauncher):
            patch.setattr(launcher, "launch", reached)
        patch.setattr("dcl_lightning.distributed.horovod.launcher.HorovodLauncher.launch", reached, raising=False)
        patch.setattr(ContinualCLI, "setup_parser", setup_parser)
        yield


def attempt(args: list[str], folder: Path) -> Outcome:
    """Run a command in a folder.

    Args:
        args: of the command line.
        folder: what is made there is removed again.
    """
    before, here = set(folder.rglob("*")), os.getcwd()
    out, err = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    os.chdir(folder)
    before_alarm = signal.signal(signal.SIGALRM, _hangs)
    streams = {h: h.setStream(err) for name in ("pytorch", "fabric") for h in _handlers(f"lightning.{name}")}
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            code: int | None = cli.main(args)
    except Reached:
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except (Exception, Hangs):
        code = None
        err.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before_alarm)
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        for handler, stream in streams.items():
            handler.setStream(stream or sys.stderr)
    if not folder.exists():
        folder.mkdir()
        return Outcome(args, code, err.getvalue(), ["..: removed the working folder"])
    made = sorted(set(folder.rglob("*")) - before, reverse=True)
    names = [str(path.relative_to(folder)) for path in made]
    for path in made:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return Outcome(args, code, err.getvalue(), names)


def _handlers(logger: str) -> list[logging.StreamHandler[Any]]:
    return [handler for handler in logging.getLogger(logger).handlers if isinstance(handler, logging.StreamHandler)]


def _hangs(*_: Any) -> None:
    raise Hangs


def refused(outcomes: Iterable[Outcome]) -> int:
    """Return how many commands were refused."""
    return sum(outcome.code == 2 for outcome in outcomes)


def leaf_keys(agent: str) -> list[str]:
    """Return every key that ``fit --print_config`` shows for an agent, and those of a memory that it leaves null.

    Args:
        agent: short name.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(["fit", "--model", agent, "--print_config"])
    config = yaml.safe_load(out.getvalue())
    keys = list(_leaves(config, ""))
    if "model.rehearsal" in keys:
        keys += [f"model.rehearsal.{field.name}" for field in fields(RehearsalConfig)]
    return list(dict.fromkeys(keys))


def _leaves(node: Any, prefix: str) -> Iterator[str]:
    if not isinstance(node, dict) or not node:
        yield prefix
        return
    for key, value in node.items():
        if key == "class_path":
            yield prefix
        elif key == "init_args":
            yield from _leaves(value, prefix)
        else:
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
