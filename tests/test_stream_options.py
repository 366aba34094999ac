"""Options of a stream on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcl_lightning import cli

QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


def fit(*args: str) -> int:
    return cli.main(["fit", *args, *QUIET])


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report() -> dict:
    return json.loads(Path("report/accuracy_matrix.json").read_text())


def test_epochs_for_each_task_and_a_seeded_order() -> None:
    order = ["--data.class_order", "1993", "--data.initial_increment", "4", "--data.increment", "3"]
    assert fit("--model.epochs_per_task", "[2,1,3]", *order, "--data.batch_size", "100") == 0
    facts = report()
    # 4, 3 and 3 classes, about 145 samples each; half of a task's batches in the last one is a whole batch.
    steps = [-(-samples // 100) for samples in facts["task_samples"]]
    assert facts["optimizer_steps"] == 2 * steps[0] + steps[1] + 3 * steps[2]
    assert [len(classes) for classes in facts["task_classes"]] == [4, 3, 3]
    assert [label for classes in facts["task_classes"] for label in classes] != list(range(10))


def test_a_scenario_of_continuum_as_json() -> None:
    spec = {"class_path": "continuum.scenarios.Permutations", "init_args": {"nb_tasks": 3, "seed": 1}}
    assert fit("--data.scenario", json.dumps(spec), "--data.batch_size", "500") == 0
    facts = report()
    assert facts["task_classes"] == [list(range(10))] * 3
    assert facts["task_samples"] == [1437] * 3
    assert [sum(value is not None for value in row) for row in facts["matrix"]] == [1, 2, 3]


def test_a_scenario_in_a_configuration_file_comes_back_from_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(
        "data: {class_path: ContinualDataModule, init_args: {scenario: {class_path: "
        "continuum.scenarios.TransformationIncremental, init_args: {incremental_transformations: "
        "[[], [{class_path: torchvision.transforms.GaussianBlur, init_args: {kernel_size: 3}}]]}}}}\n"
    )
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "a.yaml", "--print_config"])
    Path("b.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "b.yaml", "--print_config"])
    assert capsys.readouterr().out == Path("b.yaml").read_text()
    assert fit("--config", "b.yaml", "--trainer.fast_dev_run", "1") == 0


def test_blurry_with_hidden_boundaries_in_flags() -> None:
    flags = ["--data.scenario", "blurry", "--data.blurriness", "0.3", "--data.sharding", "fixed"]
    flags += ["--data.boundaries", "hidden"]
    assert fit("--model", "nil", *flags, "--model.rehearsal.buffer_size", "50", "--data.batch_size", "200") == 0
    assert report()["task_classes"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.epochs_per_task", "[2,1]"], ["epochs_per_task=[2, 1] has 2 numbers for 5 tasks", "one for each"]),
        (["--model.epochs_per_task", "[2,0,1,1,1]"], ["epochs_per_task=[2, 0, 1, 1, 1]", "at least 1"]),
        (["--data.scenario", "blury"], ["data.scenario='blury'", "blurry"]),
        (["--data.scenario", "blurry", "--data.blurriness", "1"], ["data.blurriness=1", "below 1"]),
        (["--data.class_order", "randomly"], ["data.class_order='randomly'", "icarl_1993"]),
        (["--data.boundaries", "hidden", "--model", "icarl"], ["data.boundaries=known", "ends of tasks"]),
        (["--data.scenario", "continuum.scenarios.Permutations"], ["Permutations", "number of tasks"]),
        (["--data.scenario", "continuum.scenarios.ClassIncremental"], ["data.scenario=class"]),
        (["--data.sharding", "fixd"], ["fixd", "fixed"]),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(args, words, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = fit(*args)
    except SystemExit as end:
        code = end.code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert code == 2
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert not Path("checkpoints").exists()
