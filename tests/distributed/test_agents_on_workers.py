"""Agents on real Horovod workers through the real command line, against one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.workers import ROOT, run_script


def fit(folder: Path, *args: str, timeout: float = 240) -> tuple[dict, dict]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "fit", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = next((folder / "runs").glob("*/version_0"))
    report = json.loads((run / "report" / "accuracy_matrix.json").read_text())
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return report, checkpoint


@pytest.mark.parametrize(
    ("agent", "strategy"),
    [
        ("icarl", "horovod"),
        *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in (("base", "horovod"), ("icarl", "ddp"))),
    ],
)
def test_two_workers_equal_one_with_the_double_batch(agent: str, strategy: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    common = ["--config", str(ROOT / f"configs/{agent}_digits.yaml"), "--model.epochs_per_task", "2"]
    # In float32 the order of a sum may decide which of two samples, about as near to a mean, is an exemplar.
    common += ["--trainer.precision", "64-true"]
    report1, ckpt1 = fit(one, *common, "--data.init_args.batch_size", "16")
    workers = ["--trainer.strategy", strategy, "--trainer.devices", "2"]
    report2, ckpt2 = fit(two, *common, "--data.init_args.batch_size", "8", *workers)
    assert report2["world_size"] == 2
    for name, value in ckpt1["state_dict"].items():
        torch.testing.assert_close(ckpt2["state_dict"][name], value, atol=1e-10, rtol=1e-10, msg=name)
    assert report1["matrix"] == report2["matrix"]
    if agent == "icarl":
        for y, ids in ckpt1["exemplars"].items():
            assert torch.equal(ids, ckpt2["exemplars"][y])


def test_horovodrun_gives_each_worker_its_place(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "horovodrun"), "-np", "2", sys.executable, str(ROOT / "cli.py"), "fit"]
    args = ["--config", str(ROOT / "configs/base_digits.yaml"), "--model.epochs_per_task", "1"]
    done = subprocess.run(
        [*command, *args, "--trainer.strategy", "horovod"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list((tmp_path / "runs" / "base_digits").iterdir())
    assert [run.name for run in runs] == ["version_0"], "one worker writes"
    assert json.loads((runs[0] / "report" / "accuracy_matrix.json").read_text())["world_size"] == 2


def test_ten_images_on_three_workers_count_as_ten(tmp_path: Path) -> None:
    done = run_script("ten_images", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"total{rank}").read_text() for rank in range(3)] == ["10"] * 3
