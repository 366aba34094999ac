"""Jobs over several hosts end bit for bit as the same job on one host, whoever starts them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.hosts import Host, needs_hosts, several_hosts

pytestmark = [needs_hosts, pytest.mark.timeout(600)]

FIT = "cli.py fit --config configs/{agent}_digits.yaml --model {model} --model.epochs_per_task 1"
FIT += " --trainer.logger.init_args.save_dir {folder} --trainer.strategy "
DDP = "ddp --trainer.devices {each} --trainer.num_nodes {count}"
PORT = 29511


def horovodrun(count: int, each: int, fit: str) -> dict[int, str]:
    """Return the command of each host, by its place: that of the first, which starts workers on all."""
    slots = ",".join(f"host{k + 1}:{each}" for k in range(count))
    return {0: f"horovodrun --gloo -np {count * each} -H {slots} python {fit}horovod"}


def horovodrun_from_elsewhere(count: int, each: int, fit: str) -> dict[int, str]:
    """From a host that has no worker."""
    return {count: horovodrun(count, each, fit)[0]}


def torchrun(count: int, each: int, fit: str) -> dict[int, str]:
    """On each host."""
    words = f"torchrun --nnodes {count} --nproc-per-node {each} --master-addr host1 --master-port {PORT}"
    ddp = DDP.format(each=each, count=count)
    return {k: f"{words} --node-rank {k} {fit}{ddp}" for k in range(count)}


def variables(count: int, each: int, fit: str) -> dict[int, str]:
    """By the variables from which Lightning starts the workers of each host."""
    ddp = DDP.format(each=each, count=count)
    return {k: f"MASTER_ADDR=host1 MASTER_PORT={PORT} NODE_RANK={k} python {fit}{ddp}" for k in range(count)}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with several_hosts(3, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def run(hosts: list[Host], commands: dict[int, str], folder: Path) -> tuple[str, list[Any], dict[str, torch.Tensor]]:
    """Run a job; return what it said, its accuracy matrix, and its last weights."""
    folder.mkdir()
    jobs = {}
    for place, command in commands.items():
        with (folder / f"said_{place}").open("w") as said:
            jobs[place] = hosts[place].popen(command, stdout=said, stderr=said)
    codes = [job.wait(timeout=500) for job in jobs.values()]
    said = "".join((folder / f"said_{place}").read_text() for place in commands)
    assert codes == [0] * len(codes), said
    end = time.monotonic() + 10  # for the sessions of ssh to close
    while (left := [host.processes() for host in hosts if host.processes()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    (report,), (saved,) = folder.rglob("accuracy_matrix.json"), folder.rglob("last.ckpt")
    return said, json.loads(report.read_text())["matrix"], torch.load(saved, weights_only=True)["state_dict"]


SLOW = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("launcher", "count", "each", "model"),
    [
        (horovodrun, 2, 1, "nil_global"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [
                (horovodrun, 2, 1, "derpp"),
                (horovodrun, 2, 1, "icarl"),
                (horovodrun, 2, 2, "nil_global"),
                (horovodrun, 3, 1, "nil_global"),
                (horovodrun_from_elsewhere, 2, 1, "nil_global"),
                (torchrun, 2, 1, "nil_global"),
                (torchrun, 2, 2, "nil_global"),
                (torchrun, 3, 1, "derpp"),
                (variables, 2, 1, "nil_global"),
                (variables, 2, 2, "derpp"),
            ]
        ),
    ],
)
def test_a_job_on_several_hosts_ends_as_on_one(
    launcher: Any, count: int, each: int, model: str, hosts: list[Host], tmp_path: Path
) -> None:
    def fit(folder: str) -> str:
        agent = model.removesuffix("_global")
        return FIT.format(agent=agent, model=model, folder=tmp_path / folder)

    workers = count * each
    if launcher in (horovodrun, horovodrun_from_elsewhere):
        alone = f"python {fit('alone')}horovod --trainer.devices {workers}"
    else:
        alone = f"python {fit('alone')}ddp --trainer.devices {workers}"
    _, matrix, weights = run(hosts, {0: alone}, tmp_path / "alone")
    said, matrix_of_many, weights_of_many = run(hosts, launcher(count, each, fit("several")), tmp_path / "several")
    assert said.count(f"{workers} workers on {count} hosts") == (alone.count("horovod") > 0)
    assert matrix_of_many == matrix
    assert weights.keys() == weights_of_many.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, weights_of_many[name]), name
