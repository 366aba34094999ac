"""``dcl-lightning sweep SWEEP``: an Optuna search for the values with the best validation accuracy.

The file names a configuration and the values to try, as ``configs/sweep_icarl_digits.yaml`` does. Each trial holds out
samples of every class; its score is the average accuracy on them after the last task. Test data are not used. Finished
trials stay in the study's folder: the same command again continues the search.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dcl_lightning.cli.messages import CommandParser
from dcl_lightning.errors import ConfigurationError, suggestion
from dcl_lightning.paths import expanded
from dcl_lightning.studies.runs import Fit, arguments, claim_folder, read_config, run_fit
from dcl_lightning.types import StateDict

__all__ = ["main", "nested", "validation_accuracy"]

_KEYS = ("config", "trials", "val_ratio", "seed", "parameters")


def main(args: Sequence[str], fit: Fit = run_fit) -> int:
    """Run the remaining trials, and write the best values to ``best.yaml``.

    Args:
        args: those after ``sweep``.
        fit: runs one fit.

    Returns:
        Exit code.
    """
    parser = CommandParser(
        "sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="SWEEP", help="File that defines the search.")
    parser.add_argument("--out", help="Folder of the study. (default: runs/NAME of the file)")
    parser.add_argument("--trials", type=int, help="Number of trials in all; the file's if left out.")
    given, more = parser.parse_known_args(args)
    plan = _read(Path(given.file))
    for option in more:
        if option.startswith(("--data.select_on_test", "--data.val_ratio")):
            raise ConfigurationError(
                f"{option}: a sweep selects on hold-outs alone; their share is val_ratio in {given.file}"
            )
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError("sweep needs Optuna: pip install 'dcl-lightning[sweep]'") from error
    folder = Path(given.out or Path("runs") / Path(given.file).stem)
    config = str(Path(given.file).parent / expanded(plan["config"]))
    text = read_config(config)
    what = {key: plan[key] for key in _KEYS if key != "trials"} | {"options": more}
    claim_folder(folder, what | {"config": text})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}", direction="maximize", load_if_exists=True
    )
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    # Another seed for a continued search, which would otherwise repeat its first trials.
    study.sampler = optuna.samplers.TPESampler(seed=plan["seed"] + len(study.trials))
    wanted = given.trials or plan["trials"]
    for number in range(len(done), wanted):
        trial = study.ask()
        values = {key: _suggest(trial, key, space) for key, space in plan["parameters"].items()}
        place = folder / f"trial_{trial.number}"
        flags = [
            word
            for key, value in values.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
        flags += ["--seed_everything", str(plan["seed"]), "--data.val_ratio", str(plan["val_ratio"])]
        code = fit(arguments(config, place, [*more, *flags]))
        score = validation_accuracy(place / "metrics.csv") if code == 0 else None
        if score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if code in (2, 130, 143):  # fails again in the same way, or was stopped by hand
                return code
            continue
        study.tell(trial, score)
        print(f"trial {number + 1} of {wanted}: {100 * score:.1f} % of the hold-outs with {values}", flush=True)
    try:
        best, value = study.best_params, study.best_value
    except ValueError as error:
        raise ConfigurationError(f"no trial of {folder} ended well: look at the first one's message") from error
    (folder / "best.yaml").write_text(yaml.safe_dump(nested(best), sort_keys=False))
    print(f"Best of {len(study.trials)}: {100 * value:.1f} % of the hold-outs with {best}")
    print(f"Use it: --config {config} --config {folder / 'best.yaml'}")
    return 0


def validation_accuracy(metrics: Path) -> float | None:
    """Return the average accuracy over the tasks' hold-outs after the last epoch; None if it was not logged.

    Args:
        metrics: the ``metrics.csv`` of a run.
    """
    last: dict[str, float] = {}
    if metrics.is_file():
        with metrics.open(newline="") as file:
            for row in csv.DictReader(file):
                last |= {k: float(v) for k, v in row.items() if k and k.startswith("val/acc_task_") and v}
    tasks = [value for name, value in last.items() if name.rpartition("_")[2].isdecimal()]
    return sum(tasks) / len(tasks) if tasks else None


def nested(values: Mapping[str, object]) -> StateDict:
    """Return values by flag in the structure of a configuration file.

    >>> nested({"model.lr": 0.1, "model.rehearsal.num_samples": 8})
    {'model': {'init_args': {'lr': 0.1, 'rehearsal': {'num_samples': 8}}}}

    Args:
        values: by flag, without the dashes.
    """
    result: StateDict = {}
    for key, value in values.items():
        parts = key.replace(".init_args", "").split(".")
        place = result
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if part in ("model", "data", "backbone"):
                place = place.setdefault("init_args", {})
        place[parts[-1]] = value
    return result


def _suggest(trial: Any, key: str, space: StateDict) -> bool | int | float | str | None:
    if "choices" in space:
        return trial.suggest_categorical(key, space["choices"])
    low, high, log = space["low"], space["high"], bool(space.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return trial.suggest_float(key, low, high, log=log)


def _read(path: Path) -> StateDict:
    """Return the plan of a sweep.

    Raises:
        ConfigurationError: an unknown key or wrong value, or one that would select on test data.
    """
    try:
        plan: StateDict = yaml.safe_load(read_config(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path} is no YAML: {error}") from error
    if not isinstance(plan, dict):
        raise ConfigurationError(f"{path}: give {', '.join(_KEYS)}")
    for key in plan:
        if key not in _KEYS:
            raise ConfigurationError(
                f"{path}: no such key {key}{suggestion(str(key), _KEYS)}; there are {', '.join(_KEYS)}"
            )
    defaults: StateDict = {"trials": 20, "val_ratio": 0.2, "seed": 0}
    plan = defaults | plan
    if not plan.get("config") or not isinstance(plan.get("parameters"), dict) or not plan["parameters"]:
        raise ConfigurationError(f"{path}: give config, the file of a fit, and parameters, the values to try")
    if not isinstance(plan["val_ratio"], (int, float)) or not 0 < plan["val_ratio"] < 1:
        raise ConfigurationError(
            f"{path}: val_ratio={plan['val_ratio']}: a sweep selects on hold-outs, never on test data: give a share "
            "above 0 and below 1"
        )
    for key, space in plan["parameters"].items():
        if key.endswith(("val_ratio", "evaluate_on", "select_on_test", "seed", "seed_everything", "class_order")):
            raise ConfigurationError(f"{path}: parameters.{key} is no value to select: it changes what is measured")
        good = isinstance(space, dict) and (
            {"choices"} == {*space} or {"low", "high"} <= {*space} <= {"low", "high", "log"}
        )
        if not good:
            raise ConfigurationError(f"{path}: parameters.{key}={space}: give low and high, log with them, or choices")
    return plan
