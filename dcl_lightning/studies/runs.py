"""The runs of a study: fits in processes and folders of their own, found again by their reports."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dcl_lightning.errors import ConfigurationError, suggestion
from dcl_lightning.paths import replacing
from dcl_lightning.types import StateDict

__all__ = [
    "Fit", "Run", "arguments", "claim_folder", "find_runs", "grouped", "is_finished", "one_each", "read_config",
    "run_fit",
]  # fmt: skip

Fit = Callable[[list[str]], int]

REPORT = Path("report") / "accuracy_matrix.json"

# Options of the trainer that change what is learnt, except its devices, which the number of workers stands for.
_LEARNS = (
    "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches",
    "overfit_batches", "sync_batchnorm",
)  # fmt: skip


def run_fit(args: list[str]) -> int:
    """Run the command line in a process of its own, and return its exit code."""
    return subprocess.run([sys.executable, "-m", "dcl_lightning", *args], check=False).returncode


def arguments(config: str, folder: Path, more: Sequence[str]) -> list[str]:
    """Return the arguments of a fit that writes into a folder, and resumes an interrupted fit in it.

    Args:
        config: path of the configuration file.
        folder: of the run.
        more: arguments after the file, which override it.
    """
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder.parent.parent)]
    logger += ["--trainer.logger.name", folder.parent.name, "--trainer.logger.version", folder.name]
    last = folder / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.is_file() and not is_finished(folder) else []
    return ["fit", "--config", config, *logger, *more, *resume]


def read_config(path: str | Path) -> str:
    """Return the text of a configuration file.

    Args:
        path: of the file.

    Raises:
        ConfigurationError: it does not exist, with the nearest name; or it cannot be read as UTF-8.
    """
    file = Path(path)
    if not os.path.isfile(file):
        names = [p.name for p in file.parent.iterdir()] if os.path.isdir(file.parent) else []
        raise ConfigurationError(f"no file {path}{suggestion(file.name, names)}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): give a file in UTF-8") from error


def claim_folder(folder: Path, study: Mapping[str, object]) -> None:
    """Record a study's definition in its folder, or refuse to mix its runs with those of another study.

    Args:
        folder: of the study.
        study: its definition, as JSON can hold it.

    Raises:
        ConfigurationError: the folder is another study's.
    """
    file = folder / "study.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as draft:  # jobs of an array start together
            draft.write_text(json.dumps(study, indent=1) + "\n")
        return
    kept = json.loads(file.read_text())
    different = sorted(key for key in {*kept, *study} if kept.get(key) != study.get(key))
    if different:
        raise ConfigurationError(
            f"{folder} holds another study, of which {', '.join(different)} differ: give another --out, or remove it"
        )


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        folder: of the run.
        facts: the content of its ``accuracy_matrix.json``.
        seed: of training; None if neither configuration nor report has it.
        order: the order of classes, as it was given; None for the data's own.
        key: equal for runs that differ only in seed, order and folder.
        written: when its report was written, in seconds since 1970.
    """

    folder: Path
    facts: StateDict
    seed: int | None
    order: str | None
    key: str
    written: float

    @property
    def replicate(self) -> tuple[int | str, str | None]:
        """Seed and order, which identify a sample of the configuration; the folder stands for an unknown seed."""
        return str(self.folder.resolve()) if self.seed is None else self.seed, self.order


def find_runs(places: Sequence[str]) -> list[Run]:
    """Return the finished runs in and below folders, sorted by folder.

    Args:
        places: folders of runs or of studies, or reports.

    Raises:
        ConfigurationError: one of them has none.
    """
    runs: dict[Path, Run] = {}
    for place in places:
        path = Path(place)
        reports = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            reports = sorted(path.rglob("accuracy_matrix.json"))
        found = [_read(report) for report in reports if _last_row(report) is not None]
        if not found:
            raise ConfigurationError(f"{place}: no finished run in or below it, none with {REPORT}")
        runs |= {run.folder.resolve(): run for run in found}
    return list(runs.values())


def is_finished(folder: Path) -> bool:
    """Return whether a run's report is of the whole stream."""
    return _last_row(folder / REPORT) is not None


def _last_row(report: Path) -> list[float | None] | None:
    """Return the last row of a report's matrix; None without a report, or if the fit did not reach the last task."""
    try:
        last = json.loads(report.read_text())["matrix"][-1]
        return last if any(value is not None for value in last) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # not one of our reports
        return None


def _read(report: Path) -> Run:
    folder = report.parent.parent
    facts = json.loads(report.read_text())
    config_file = folder / "config.yaml"
    config = yaml.safe_load(config_file.read_text()) if config_file.is_file() else {}
    data = dict((config.get("data") or {}).get("init_args") or {})
    order = data.pop("class_order", None)
    data.pop("seed", None)
    if config:
        same = {"model": config.get("model"), "data": data}
    else:
        same = {"agent": facts["agent"], "dataset": facts["dataset"], "evaluated_on": facts.get("evaluated_on", "test")}
    trainer = config.get("trainer") or {}
    same["trainer"] = {name: trainer[name] for name in _LEARNS if trainer.get(name) is not None}
    same["workers"] = facts.get("world_size")
    key = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()
    seed = config.get("seed_everything")
    if seed is None or isinstance(seed, bool):  # random, or none: the report has it
        seed = facts.get("seed")
    order = None if order is None else str(order)
    return Run(folder, facts, None if seed is None else int(seed), order, key, report.stat().st_mtime)


def one_each(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keep one run of each configuration, seed and order: a copy or a resumed run is no second sample.

    Args:
        runs: in any order.

    Returns:
        Of each the run with the newest report, in the order of their first runs; and a notice for each duplicate.
    """
    same: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        same.setdefault((run.key, run.replicate), []).append(run)
    kept, notes = [], []
    for copies in same.values():
        newest = max(copies, key=lambda run: run.written)
        kept.append(newest)
        if len(copies) > 1:
            others = ", ".join(str(run.folder) for run in copies if run is not newest)
            order = "" if newest.order is None else f", order {newest.order}"
            notes.append(
                f"Seed {newest.seed}{order} of one configuration counts once, by the newest run {newest.folder}, "
                f"without {others}"
            )
    return kept, notes


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each configuration by its name: that of their folder, with a number if two share it.

    Args:
        runs: in any order.
    """
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    names: dict[str, list[Run]] = {}
    for members in by_key.values():
        name = members[0].folder.parent.name or str(members[0].facts.get("agent"))
        number = 2
        unique = name
        while unique in names:
            unique, number = f"{name} ({number})", number + 1
        names[unique] = members
    return names
