"""The command line as a user types it."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dcl_lightning import cli

ROOT = Path(__file__).parent.parent


def run(args: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *args], cwd=cwd, capture_output=True, text=True, timeout=240
    )


def test_fit_writes_the_report(tmp_path: Path) -> None:
    done = run(["fit", "--config", str(ROOT / "configs/icarl_digits.yaml"), "--model.epochs_per_task", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "icarl_digits" / "version_0"
    report = json.loads((folder / "report" / "accuracy_matrix.json").read_text())
    assert len(report["matrix"]) == 5
    assert report["matrix"][0][1] is None
    assert (folder / "report" / "accuracy_matrix.png").stat().st_size > 1000
    assert (folder / "report" / "accuracy_matrix.csv").exists()
    assert (folder / "report" / "summary.md").exists()
    assert (folder / "config.yaml").exists()
    assert list((folder / "checkpoints").glob("last*.ckpt"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_memory_in_the_background_within_ten_seconds(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    (tmp_path / "told.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Told(pl.Callback):\n"
        "    def on_train_epoch_end(self, trainer, pl_module):\n"
        "        print('an epoch has passed', flush=True)\n"
    )
    options = ["--model.init_args.epochs_per_task", "100000", "--trainer.callbacks", "told.Told"]
    config = str(ROOT / "configs/nil_digits.yaml")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "fit", "--config", config, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "an epoch has passed" in line:
            break
    process.send_signal(signum)
    started = time.monotonic()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code, "".join(lines) + rest
    assert time.monotonic() - started < 10
    assert "Traceback" not in rest


def test_short_names_with_flags_only(tmp_path: Path) -> None:
    done = run(
        [
            "fit",
            "--model",
            "base",
            "--model.epochs_per_task",
            "1",
            "--data.dataset",
            "digits",
            "--data.increment",
            "5",
        ]
        + ["--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["fit", "--model.learning_rat", "1"], "learning_rat"),
        (["fit", "--data.datasett", "digits"], "datasett"),
        (["fit", "--data.increment", "5,5"], "increment"),
        (["fit", "--data.increment", "0"], "increment"),
        (["fit", "--data.initial_increment", "15", "--data.increment", "2"], "initial_increment"),
        (["fit", "--trainer.max_epochs", "7"], "epochs_per_task"),
        (["fit", "--model", "nosuchagent"], "nosuchagent"),
        ([], "subcommand"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(
    args: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = cli.main(args)
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capfd.readouterr().err
    assert word in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_missing_cifar100_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run(["fit", "--config", str(ROOT / "configs/icarl_cifar100.yaml")], tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "CIFAR100" in errors[0]
    assert "data.download" in errors[0]
    assert not (tmp_path / "datasets").exists()
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - start < 60


def write_cifar100(folder: Path) -> None:
    target = folder / "cifar-100-python"
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 4), ("test", 2)):
        fine = np.repeat(np.arange(100), per_class)
        content = {
            b"data": rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8),
            b"fine_labels": fine.tolist(),
            b"coarse_labels": (fine // 5).tolist(),
            b"filenames": [f"{i}.png".encode() for i in range(len(fine))],
            b"batch_label": b"one",
        }
        (target / split).write_bytes(pickle.dumps(content))
    names = {b"fine_label_names": [f"c{i}".encode() for i in range(100)], b"coarse_label_names": [b"s"] * 20}
    (target / "meta").write_bytes(pickle.dumps(names))


def test_icarl_cifar100_on_files_in_its_own_format(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "datasets" / "CIFAR100")
    done = run(
        ["fit", "--config", str(ROOT / "configs/icarl_cifar100.yaml"), "--trainer.limit_train_batches", "3"]
        + [
            "--model.epochs_per_task",
            "1",
            "--model.init_args.rehearsal.buffer_size",
            "200",
            "--data.batch_size",
            "8",
        ]
        + ["--data.init_args.increment", "50", "--trainer.accelerator", "cpu"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs/icarl_cifar100/version_0/report/accuracy_matrix.json").read_text())
    assert len(report["matrix"]) == 2


def test_second_run_gets_a_new_folder_and_resume_works(tmp_path: Path) -> None:
    args = ["fit", "--config", str(ROOT / "configs/base_digits.yaml"), "--model.epochs_per_task", "1"]
    assert run(args, tmp_path).returncode == 0
    assert run(args, tmp_path).returncode == 0
    folder = tmp_path / "runs" / "base_digits"
    assert (folder / "version_1" / "report" / "summary.md").exists()
    done = run([*args, "--ckpt_path", str(folder / "version_0" / "checkpoints" / "last.ckpt")], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.exhaustive
def test_fresh_processes_with_one_seed_agree_bit_for_bit(tmp_path: Path) -> None:
    args = ["fit", "--config", str(ROOT / "configs/icarl_digits.yaml"), "--model.epochs_per_task", "1"]
    weights, matrices = [], []
    for run_number, seed in enumerate((0, 0, 1)):
        assert run([*args, "--seed_everything", str(seed)], tmp_path).returncode == 0
        folder = tmp_path / "runs" / "icarl_digits" / f"version_{run_number}"
        weights.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        matrices.append(json.loads((folder / "report" / "accuracy_matrix.json").read_text())["matrix"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert matrices[0] == matrices[1]
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_another_agent_after_a_config_keeps_only_what_is_shared(tmp_path: Path) -> None:
    config = str(ROOT / "configs/icarl_digits.yaml")
    done = run(["fit", "--config", config, "--model", "base", "--print_config"], tmp_path)
    assert done.returncode == 0, done.stderr
    model = yaml.safe_load(done.stdout)["model"]
    assert model["class_path"].endswith("short_names.base")
    assert (model["init_args"]["momentum"], model["init_args"]["train_classes"]) == (0.9, "all")
    assert "model.train_classes" in done.stderr


@pytest.mark.parametrize(
    ("agent", "size"), [("nil_global", {"buffer_size": 60}), ("icarl", {"buffer_size": 60}), ("base", None)]
)
def test_the_memory_keeps_its_size_for_another_agent(
    agent: str, size: dict[str, int] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"buffer_size": 60, "num_samples": 3, "policy": "reservoir", "weighting": "none"}
    model = {"class_path": "nil", "init_args": {"backbone": "mlp", "lr": 0.3, "rehearsal": memory}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(tmp_path / "a.yaml"), "--model", agent, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    given = found.get("rehearsal")
    assert (given and {key: value for key, value in given.items() if value is not None}) == size
    assert found["lr"] == 0.3


def test_bare_name_quoted_lists_and_numbers_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: icarl\ndata: {class_path: ContinualDataModule, init_args: {class_order: '[1,0,2,3,4,5,6,7,8,9]'}}\n"
    )
    done = run(["fit", "--config", "a.yaml", "--model.lr", "1e-2", "--print_config"], tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["model"]["class_path"].endswith("short_names.icarl")
    assert config["model"]["init_args"]["lr"] == 0.01
    assert config["data"]["init_args"]["class_order"][:2] == [1, 0]


def test_a_second_run_without_a_logger_and_its_resume(tmp_path: Path) -> None:
    args = ["fit", "--config", str(ROOT / "configs/base_digits.yaml"), "--model.epochs_per_task", "1"]
    args += ["--trainer.logger", "false"]
    for _ in range(2):
        done = run(args, tmp_path)
        assert done.returncode == 0, done.stderr
    done = run([*args, "--ckpt_path", "checkpoints/last.ckpt"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "summary.md").exists()


def test_values_of_the_command_line_win_over_the_checkpoints(tmp_path: Path) -> None:
    args = ["fit", "--config", str(ROOT / "configs/icarl_digits.yaml"), "--model.epochs_per_task", "1"]
    assert run([*args, "--trainer.max_steps", "20"], tmp_path).returncode == 0
    checkpoint = str(tmp_path / "runs" / "icarl_digits" / "version_0" / "checkpoints" / "last.ckpt")
    done = run([*args, "--ckpt_path", checkpoint, "--model.init_args.rehearsal.buffer_size", "20"], tmp_path)
    assert done.returncode == 0, done.stderr
    last = torch.load(tmp_path / "runs/icarl_digits/version_1/checkpoints/last.ckpt", weights_only=True)
    assert sum(len(ids) for ids in last["exemplars"].values()) == 20


def test_validate_a_lone_checkpoint(tmp_path: Path) -> None:
    args = ["fit", "--config", str(ROOT / "configs/icarl_digits.yaml"), "--model.epochs_per_task", "1"]
    assert run(args, tmp_path).returncode == 0
    folder = tmp_path / "runs" / "icarl_digits" / "version_0"
    report = json.loads((folder / "report" / "accuracy_matrix.json").read_text())
    done = run(
        ["test", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--trainer.accelerator", "cpu"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "runs" / "dcl" / "version_0" / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["test/acc"]) == pytest.approx(report["pooled_accuracy"], abs=1e-6)


def test_any_network_of_timm_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["fit", "--model.backbone", "timm", "--model.backbone.name", "resnet10t", "--data.dataset", "synthetic"]
    with pytest.raises(SystemExit):
        cli.main([*args, "--print_config"])
    backbone = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert backbone["class_path"].endswith("backbones.short_names.timm")
    assert backbone["init_args"]["name"] == "resnet10t"
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "pip install 'dcl-lightning[timm]'" in errors[0]


def test_one_factor_for_each_milestone_in_flags(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model.milestones", "[2,3]", "--model.gamma", "[0.5,0.1]", "--model.decay_biases_and_norms", "false"]
    with pytest.raises(SystemExit):
        cli.main(["fit", *args, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (model["milestones"], model["gamma"], model["decay_biases_and_norms"]) == ([2, 3], [0.5, 0.1], False)
