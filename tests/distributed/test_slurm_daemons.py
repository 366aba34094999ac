"""The documents' batch scripts under SLURM's own daemons: requeued jobs end as undisturbed ones."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conformance.rehearsal_runs import same
from tests.distributed.hosts import needs_hosts, several_hosts
from tests.distributed.slurm_cluster import Cluster, cluster_of, needs_slurm
from tests.distributed.workers import ROOT

pytestmark = [needs_hosts, needs_slurm, pytest.mark.exhaustive, pytest.mark.timeout(1200)]

PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)
HOROVODRUN, SRUN = SCRIPTS
# In place of what the script asks for, on a cluster of few cores without GPUs.
SMALL = "--ntasks-per-node=1 --cpus-per-task=1 --gres=none --time=30"
OPTIONS = "--model nil_global --model.epochs_per_task 25 --trainer.accelerator cpu"
OPTIONS += " --trainer.default_root_dir {folder} --trainer.logger.init_args.save_dir {folder}/runs"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with several_hosts(2, tmp_path_factory.mktemp("hosts")) as hosts, cluster_of(hosts, folder) as cluster:
        yield cluster


def submit(cluster: Cluster, script: str, folder: Path, options: str = SMALL) -> str:
    """Submit a script of the documents that trains in a folder; return the number of the job."""
    folder.mkdir()
    file = folder / "job.sbatch"
    # One worker a node in place of four, as the options of sbatch say, too.
    script = script.replace(":4/", ":1/").replace("-np 8", "-np 2").replace("devices 4", "devices 1")
    file.write_text(script.replace("FILE", f"configs/nil_digits.yaml {OPTIONS.format(folder=folder)}"))
    return cluster.submit(file, folder, f"--chdir={ROOT} {options}")


def said(folder: Path, job: str) -> str:
    file = folder / f"said-{job}"
    return file.read_text() if file.exists() else ""


def wait_for_text(cluster: Cluster, folder: Path, job: str, text: str, count: int = 1) -> None:
    end = time.monotonic() + 300
    while said(folder, job).count(text) < count:
        assert time.monotonic() < end, said(folder, job)
        assert cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), said(folder, job)
        time.sleep(0.2)


def found(folder: Path) -> dict[str, object]:
    """Return what a run has found: weights, memories, matrix and counts."""
    # A requeued job begins a folder of its own; the last one is that of its end.
    saved = max(folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime)
    report = json.loads((saved.parents[1] / "report" / "accuracy_matrix.json").read_text())
    memory = torch.load(saved, weights_only=True)["dcl_lightning"]["memory"]
    return {
        "weights": torch.load(saved, weights_only=True)["state_dict"],
        "memories": [file["sha256"] for file in memory["files"]],
        "matrix": report["matrix"],
        "samples": report["samples_seen"],
        "steps": report["optimizer_steps"],
    }


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed") / "job"
    job = submit(cluster, HOROVODRUN, folder)
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", said(folder, job)
    return found(folder)


@pytest.mark.parametrize(("script", "batch"), [(HOROVODRUN, "--batch"), (SRUN, "")], ids=["horovodrun", "srun"])
def test_a_job_that_is_requeued_twice_ends_as_an_undisturbed_one(
    script: str, batch: str, cluster: Cluster, undisturbed: dict[str, object], tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    job = submit(cluster, script, folder)
    for number, task in ((1, "task 1 (2 of 5)"), (2, "task 3 (4 of 5)")):
        wait_for_text(cluster, folder, job, task)
        cluster.call(f"scancel --signal=USR1 {batch} {job}")
        cluster.wait_for(job, "PENDING")
        cluster.call(f"scontrol update JobId={job} StartTime=now")  # not after SLURM's two minutes
        assert len(list(folder.glob("hpc_ckpt_*.ckpt"))) == number
    assert cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", said(folder, job)
    assert same(found(folder), undisturbed)


def test_a_job_whose_time_is_over_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """By SLURM's own clock, which counts minutes."""
    folder = tmp_path / "job"
    options = SMALL.replace("--time=30", "--time=2 --signal=B:USR1@100")
    job = submit(cluster, HOROVODRUN.replace("FILE", "FILE --model.epochs_per_task 500"), folder, options)
    cluster.wait_for(job, "RUNNING")
    cluster.wait_for(job, "PENDING")
    assert (folder / "hpc_ckpt_1.ckpt").exists(), said(folder, job)
    cluster.call(f"scontrol update JobId={job} StartTime=now")
    wait_for_text(cluster, folder, job, "Restoring states from the checkpoint path at")
    cluster.call(f"scancel {job}")
    assert cluster.wait_for(job, "CANCELLED") == "CANCELLED"
    end = time.monotonic() + 30  # SLURM has signalled them
    while left := [line for host in cluster.hosts for line in host.processes().values() if "cli.py" in line]:
        assert time.monotonic() < end, left
        time.sleep(0.5)
