"""``dcl-lightning repeat CONFIG --seeds 0..4 --orders 5``: one configuration over seeds of training and class orders.

The same command again skips finished runs, found by their report, and resumes interrupted ones from their last
checkpoint. As a SLURM array, one run per job: ``--slurm-array`` prints the command, and runs the job's run within it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.studies.compare import text_of, write_comparison
from dcl_lightning.studies.runs import (
    Fit,
    arguments,
    claim_folder,
    find_runs,
    grouped,
    is_finished,
    one_each,
    read_config,
    run_fit,
)

__all__ = ["main", "numbers"]

_MOST = 10_000  # of seeds, of orders


def main(args: Sequence[str], fit: Fit = run_fit) -> int:
    """Run the unfinished runs of the study, then write its comparison.

    Args:
        args: those after ``repeat``.
        fit: runs one fit.

    Returns:
        Exit code: 0, or 1 if a run failed.
    """
    parser = CommandParser(
        "repeat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG", help="Configuration file of a fit.")
    parser.add_argument("--seeds", default="0..4", help="Seeds of training: 0..4, or 0,3,7. (default: 0..4)")
    parser.add_argument("--orders", type=int, help="How many class orders; the file's own alone if left out.")
    parser.add_argument("--out", help="Folder of the study. (default: runs/NAME of the file)")
    parser.add_argument("--slurm-array", action="store_true", help="Run number SLURM_ARRAY_TASK_ID of the study.")
    given, more = parser.parse_known_args(args)
    text = read_config(given.config)
    seeds = numbers(given.seeds)
    if given.orders is not None and not 1 <= given.orders <= _MOST:
        raise ConfigurationError(f"--orders={given.orders}: give a number from 1 to {_MOST}, or leave it out")
    folder = Path(given.out or Path("runs") / Path(given.config).stem)
    orders: list[int | None] = [None] if given.orders is None else [*range(given.orders)]
    runs = {folder / _name(seed, order): _flags(seed, order) for order in orders for seed in seeds}
    if given.slurm_array:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        if task is None:
            command = shlex.join([*_program(), "repeat", *args])
            print(f"sbatch --array=0-{len(runs) - 1} --wrap {shlex.quote(command)}")
            return 0
        if int(task) >= len(runs):
            raise ConfigurationError(
                f"SLURM_ARRAY_TASK_ID={task}, but there are {len(runs)} runs: --array=0-{len(runs) - 1}"
            )
        runs = dict([list(runs.items())[int(task)]])
    claim_folder(folder, {"config": text, "options": more})
    failed = []
    for number, (place, flags) in enumerate(runs.items(), 1):
        if is_finished(place):
            print(f"run {number} of {len(runs)}: {place} is there", flush=True)
            continue
        print(f"run {number} of {len(runs)}: {place}", flush=True)
        code = fit(arguments(given.config, place, [*more, *flags]))
        if code in (2, 130, 143):  # fails again in the same way, or was stopped by hand
            return code
        if code or not is_finished(place):
            failed.append(place)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed, {failed[0]} first; give the command again", file=sys.stderr)
    if not given.slurm_array and any(is_finished(place) for place in runs):
        found, notes = one_each(find_runs([str(place) for place in runs if is_finished(place)]))
        groups = grouped(found)
        print("\n".join([text_of(groups), *notes]))
        write_comparison(groups, folder / "comparison")
        print(f"Comparison: {folder / 'comparison'}")
    return 1 if failed else 0


def numbers(text: str) -> list[int]:
    """Return the seeds in a text: ``0..4``, or ``0,3,7``.

    >>> numbers("2..4,9")
    [2, 3, 4, 9]

    Args:
        text: numbers and ranges, both ends included, between commas.

    Raises:
        ConfigurationError: anything else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        if not first.isdecimal() or (dots and not last.isdecimal()) or (dots and int(last) < int(first)):
            raise ConfigurationError(f"--seeds={text}: give numbers or ranges between commas, as in 0..4 or 0,3,7")
        if max(len(first), len(last)) > 10 or int(last if dots else first) - int(first) >= _MOST:
            raise ConfigurationError(f"--seeds={text}: give at most {_MOST} seeds below 2**32")
        found += range(int(first), int(last if dots else first) + 1)
    return list(dict.fromkeys(found))


def _name(seed: int, order: int | None) -> str:
    return f"seed_{seed}" if order is None else f"seed_{seed}_order_{order}"


def _flags(seed: int, order: int | None) -> list[str]:
    flags = ["--seed_everything", str(seed)]
    return flags if order is None else [*flags, "--data.class_order", str(order)]


def _program() -> list[str]:
    name = os.path.basename(sys.argv[0])
    return [name] if name == "dcl-lightning" else ["python", "-m", "dcl_lightning"]
