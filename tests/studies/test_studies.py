"""Studies of several runs as a user starts them; their fits run in this process, which is faster."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from dcl_lightning import cli
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.studies import compare, repeat, sweep
from dcl_lightning.studies.compare import between, estimate, paired
from dcl_lightning.studies.runs import arguments, find_runs, grouped, one_each

CONFIG = {
    "model": {"class_path": "base", "init_args": {"backbone": "mlp", "epochs_per_task": 1}},
    "data": {"class_path": "ContinualDataModule", "init_args": {"dataset": "digits", "increment": 5}},
    "trainer": {"accelerator": "cpu", "limit_train_batches": 3},
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "naive.yaml").write_text(yaml.safe_dump(CONFIG))


class Fit:
    """The command line in this process; it counts, and can be cut off."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.codes: list[int] = []

    def __call__(self, args: list[str]) -> int:
        self.given.append(args)
        try:
            return self.codes.pop() if self.codes else cli.main(args)
        except SystemExit as end:
            return int(end.code or 0)


def test_repeat_varies_seed_and_order_apart_goes_on_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = Fit()
    fit.codes = [1]  # the first run dies
    args = ["naive.yaml", "--seeds", "0..1", "--orders", "2"]
    assert repeat.main(args, fit) == 1
    assert "1 of 4 runs failed, runs/naive/seed_0_order_0 first" in capsys.readouterr().err
    assert repeat.main(args, fit) == 0
    assert [a[a.index("--trainer.logger.version") + 1] for a in fit.given] == [
        "seed_0_order_0", "seed_1_order_0", "seed_0_order_1", "seed_1_order_1", "seed_0_order_0",
    ]  # fmt: skip
    assert repeat.main(args, fit) == 0
    assert len(fit.given) == 5, "finished runs are not run again"
    runs = {run.folder.name: run for run in find_runs(["runs/naive"])}
    classes = {name: run.facts["task_classes"] for name, run in runs.items()}
    assert classes["seed_0_order_0"] == classes["seed_1_order_0"] != classes["seed_0_order_1"]
    assert (runs["seed_1_order_0"].seed, runs["seed_1_order_0"].order) == (1, "0")
    (group,) = grouped([*runs.values()]).values()
    assert len(group) == 4

    values = {(r.order, r.seed): r.facts["average_accuracy"] for r in group}
    mean, deviation = np.mean([*values.values()]), np.std([*values.values()], ddof=1)
    out = capsys.readouterr().out
    assert f"{100 * mean:.1f} ± {100 * deviation:.1f}" in out
    folder = tmp_path / "runs" / "naive" / "comparison"
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert sorted(float(row["average_accuracy"]) for row in rows) == sorted(values.values())
    assert r"\toprule" in (folder / "comparison.tex").read_text()
    assert "mean over j of R[T-1, j]" in (folder / "comparison.md").read_text()
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")

    # Another study does not mix with this one's runs.
    with pytest.raises(ConfigurationError, match="options differ"):
        repeat.main([*args, "--model.lr", "0.2"], fit)
    # Two configurations, pair by pair.
    assert repeat.main([*args, "--out", "runs/other", "--model.lr", "0.2"], fit) == 0
    capsys.readouterr()
    assert cli.main(["compare", "runs/naive", "runs/other", "--out", "both"]) == 0
    out = capsys.readouterr().out
    other = {(r.order, r.seed): r.facts["average_accuracy"] for r in find_runs(["runs/other"])}
    differences = [other[key] - values[key] for key in values]
    assert f"{100 * np.mean(differences):+.1f}" in out
    low, high = stats.t.interval(0.95, 3, np.mean(differences), stats.sem(differences))
    assert f"{100 * low:.1f} to {100 * high:.1f}" in out
    assert len(Path("both/comparison.csv").read_text().splitlines()) == 1 + 8


def test_an_array_of_slurm_runs_one_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["/bin/dcl-lightning"])
    args = ["naive.yaml", "--seeds", "3,5", "--slurm-array"]
    fit = Fit()
    assert repeat.main(args, fit) == 0
    said = capsys.readouterr().out
    assert said == "sbatch --array=0-1 --wrap 'dcl-lightning repeat naive.yaml --seeds 3,5 --slurm-array'\n"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert repeat.main(args, fit) == 0
    (folder,) = (tmp_path / "runs" / "naive").glob("seed_*")
    assert folder.name == "seed_5"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(ConfigurationError, match="--array=0-1"):
        repeat.main(args, fit)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    fit = Fit()
    # Cut off after the first task: its report has an empty last row.
    assert repeat.main(["naive.yaml", "--seeds", "0", "--trainer.max_steps", "3"], fit) == 1
    place = tmp_path / "runs" / "naive" / "seed_0"
    assert arguments("naive.yaml", place, [])[-2:] == ["--ckpt_path", str(place / "checkpoints" / "last.ckpt")]
    (tmp_path / "runs" / "naive" / "study.json").unlink()
    assert repeat.main(["naive.yaml", "--seeds", "0"], fit) == 0
    facts = json.loads((place / "report" / "accuracy_matrix.json").read_text())
    assert facts["optimizer_steps"] == 6
    assert not (tmp_path / "runs" / "naive" / "version_0").exists()


def written_run(
    folder: Path, accuracy: float, seed: object = 0, model: str = "base", dataset: str = "digits", **trainer: object
) -> Path:
    """A finished run of two tasks, as far as a comparison reads it."""
    (folder / "report").mkdir(parents=True)
    config = {"seed_everything": seed, "model": {"class_path": model}, "data": {"init_args": {}}, "trainer": trainer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"matrix": [[1.0, None], [1.0, accuracy]], "average_accuracy": accuracy, "agent": model, "seed": None}
    facts["dataset"] = dataset
    (folder / "report" / "accuracy_matrix.json").write_text(json.dumps(facts))
    return folder


def test_one_seed_of_a_configuration_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = written_run(Path("runs/er/first"), 0.4)
    resumed = written_run(Path("runs/er/resumed"), 0.5)
    shutil.copytree(resumed, "copies/er/copy")
    for age, folder in ((30, first), (20, "copies/er/copy"), (10, resumed)):
        report = Path(folder) / "report" / "accuracy_matrix.json"
        os.utime(report, (report.stat().st_mtime - age,) * 2)
    assert cli.main(["compare", "runs/er", "copies", "runs/er/resumed"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "50.0" in line)
    assert "40.0" not in out
    assert "±" not in row
    assert " to " not in row, "one seed has no interval"
    assert f"Seed 0 of one configuration counts once, by the newest run {resumed}, without {first}" in out

    # Two seeds are two samples; another precision is another configuration.
    written_run(Path("runs/er/second"), 0.7, seed=1)
    written_run(Path("runs/half/one"), 0.1, precision="bf16-mixed")
    kept, notes = one_each(find_runs(["runs"]))
    groups = grouped(kept)
    assert {name: sorted(run.facts["average_accuracy"] for run in runs) for name, runs in groups.items()} == {
        "er": [0.5, 0.7],
        "half": [0.1],
    }
    assert len(notes) == 1


def test_runs_of_several_data_sets_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, dataset in (("er", "digits"), ("nil", "digits"), ("more", "mnist")):
        written_run(Path("runs") / name / "one", 0.5, model=name, dataset=dataset)
    assert cli.main(["compare", "runs/er", "runs/nil"]) == 0
    assert "data sets" not in capsys.readouterr().out
    assert cli.main(["compare", "runs/er", "runs/nil", "runs/more"]) == 0
    assert "Of several data sets: er, nil of digits; more of mnist" in capsys.readouterr().out


def test_runs_of_unknown_seed_are_each_their_own() -> None:
    for number, seed in enumerate((None, False, True)):
        written_run(Path(f"runs/er/{number}"), 0.1 * number, seed=seed)
    kept, notes = one_each(find_runs(["runs"]))
    assert ([run.seed for run in kept], notes) == ([None] * 3, [])
    (runs,) = grouped(kept).values()
    assert len(runs) == 3


def test_a_mistake_is_one_line_before_any_run(capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (["compare", "nothing"], "nothing: no finished run"),
        (["repeat", "naiv.yaml"], "did you mean 'naive.yaml'"),
        (["repeat", "naive.yaml", "--seeds", "a"], "--seeds=a"),
        (["repeat", "naive.yaml", "--orders", "0"], "--orders=0"),
        (["sweep", "naive.yaml"], "no such key data"),
    ):
        assert cli.main(args) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert words in errors[0]


PLAN = {"config": "naive.yaml", "trials": 2, "val_ratio": 0.25, "parameters": {"model.lr": {"low": 0.01, "high": 0.5}}}


def test_a_sweep_goes_on_and_selects_on_hold_outs(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(PLAN))
    fit = Fit()
    fit.codes = [1]  # the first trial dies
    assert sweep.main(["sweep.yaml", "--out", "runs/s"], fit) == 0
    assert len(fit.given) == 2
    assert sweep.main(["sweep.yaml", "--out", "runs/s"], fit) == 0
    assert len(fit.given) == 3
    assert sweep.main(["sweep.yaml", "--out", "runs/s"], fit) == 0
    assert len(fit.given) == 3, "two trials are done"
    study = optuna.load_study(study_name="s", storage="sqlite:///runs/s/study.db")
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len({t.params["model.lr"] for t in done}) == 2
    for trial in done:
        rows = list(csv.DictReader((tmp_path / f"runs/s/trial_{trial.number}/metrics.csv").open()))
        last = [row for row in rows if row["val/acc_task_1"]][-1]
        assert trial.value == pytest.approx((float(last["val/acc_task_0"]) + float(last["val/acc_task_1"])) / 2)
        config = yaml.safe_load((tmp_path / f"runs/s/trial_{trial.number}/config.yaml").read_text())
        assert config["data"]["init_args"]["val_ratio"] == 0.25
    best = yaml.safe_load(Path("runs/s/best.yaml").read_text())
    assert best == {"model": {"init_args": {"lr": study.best_params["model.lr"]}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_ratio": 0}, "never on test data"),
        ({"metric": "test/acc"}, "no such key metric"),
        ({"parameters": {"data.select_on_test": {"choices": [True]}}}, "select_on_test"),
        ({"parameters": {"model.lr": {"low": 1}}}, "low and high"),
        ({"parameters": {}}, "parameters"),
        ({"trails": 3}, "did you mean 'trials'"),
    ],
)
def test_a_sweep_refuses_test_data_and_mistakes(change: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(PLAN | change))
    with pytest.raises(ConfigurationError, match=words):
        sweep.main(["sweep.yaml"], Fit())
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(PLAN))
    with pytest.raises(ConfigurationError, match="hold-outs"):
        sweep.main(["sweep.yaml", "--data.select_on_test", "true"], Fit())
    assert not Path("runs").exists()


def test_without_optuna_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(PLAN))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"dcl-lightning\[sweep\]"):
        sweep.main(["sweep.yaml"], Fit())


def test_the_sweep_that_comes_along_can_be_read() -> None:
    path = Path(cli.__file__).parents[2] / "configs" / "sweep_icarl_digits.yaml"
    plan = sweep._read(path)
    assert (path.parent / plan["config"]).is_file()


def test_estimates_are_those_of_scipy() -> None:
    values = [0.3, 0.5, 0.1, 0.45]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found == pytest.approx((np.mean(values), np.std(values, ddof=1), low, high, 4))
    assert math.isnan(estimate([1.0]).low)
    assert paired({1: 0.5, 2: 0.7, 3: 9.0}, {1: 0.4, 2: 0.5, 4: 9.0}).mean == pytest.approx(0.15)  # type: ignore[union-attr]
    assert paired({1: 0.5}, {1: 0.4}) is None
    seeds, orders = between({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0, (1, 1): 7.0})
    assert (seeds, orders) == pytest.approx((math.sqrt(2), math.sqrt(8)))
    assert all(math.isnan(v) for v in between({(0, 0): 1.0}))


def test_tables_escape_what_their_format_would_take_for_its_own() -> None:
    head, rows = ["a_b", "x"], [["50 %", "1 ± 2"]]
    assert r"a\_b & x \\" in compare.latex(head, rows)
    assert r"50 \% & 1 $\pm$ 2 \\" in compare.latex(head, rows)
    assert compare.markdown(["a|b"], [["c"]]).splitlines()[0] == r"| a\|b |"
    assert compare.plain(["name", "n"], [["x", "10"]]).splitlines() == ["name   n", "--------", "x     10"]
