"""The fits of a study, each in a process and a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dcl_lightning.errors import ConfigurationError, suggestion
from dcl_lightning.paths import replacing
from dcl_lightning.studies.runs import is_finished

__all__ = ["Fit", "arguments", "keep_to", "read_config", "run_fit"]

Fit = Callable[[list[str]], int]


def run_fit(args: list[str]) -> int:
    """Run the command line in a process of its own, and return its exit code.

    Args:
        args: from ``fit`` on.
    """
    return subprocess.run([sys.executable, "-m", "dcl_lightning", *args], check=False).returncode


def arguments(config: str, folder: Path, more: Sequence[str]) -> list[str]:
    """Return the arguments of a fit that writes into a folder, and goes on where one in it was cut off.

    Args:
        config: path of the configuration file.
        folder: of the run.
        more: arguments behind the file, which win over it.
    """
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder.parent.parent)]
    logger += ["--trainer.logger.name", folder.parent.name, "--trainer.logger.version", folder.name]
    last = folder / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.is_file() and not is_finished(folder) else []
    return ["fit", "--config", config, *logger, *more, *resume]


def read_config(path: str | Path) -> str:
    """Return the text of a configuration file, read before any run.

    Args:
        path: of the file.

    Raises:
        ConfigurationError: it is not there, with the nearest name; or it cannot be read as UTF-8.
    """
    file = Path(path)
    if not os.path.isfile(file):
        names = [p.name for p in file.parent.iterdir()] if os.path.isdir(file.parent) else []
        raise ConfigurationError(f"no file {path}{suggestion(file.name, names)}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): give a file in UTF-8") from error


def keep_to(folder: Path, what: dict[str, Any]) -> None:
    """Write down what a study is, or refuse to mix another one's runs with those that are there.

    Args:
        folder: of the study.
        what: numbers, strings, lists and dicts.

    Raises:
        ConfigurationError: the folder is another study's.
    """
    file = folder / "study.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as draft:  # jobs of an array start together
            draft.write_text(json.dumps(what, indent=1) + "\n")
        return
    kept = json.loads(file.read_text())
    different = sorted(key for key in {*kept, *what} if kept.get(key) != what.get(key))
    if different:
        raise ConfigurationError(
            f"{folder} holds another study, of which {', '.join(different)} differ: give another --out, or remove it"
        )
