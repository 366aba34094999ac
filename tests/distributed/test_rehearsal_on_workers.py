"""Rehearsal on two real Horovod workers against one process that trains on the rows of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dcl_lightning.agents.short_names import nil
from dcl_lightning.backbones import MLP
from tests.distributed.programs import rehearsal
from tests.distributed.workers import assert_ended_well, run_workers

WORKERS = 2
R = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("workers")
    assert_ended_well(run_workers(rehearsal.runs, WORKERS, folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORKERS)]


def of(runs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [worker[name] for worker in runs]


def rehearsed(run: dict[str, Any]) -> list[int]:
    return [len(step["targets"]) - step["num_new"] for step in run["steps"]]


def assert_same_run(first: dict[str, Any], second: dict[str, Any], skip: int = 0) -> None:
    ours, theirs = ([step["loss"] for step in run["steps"]] for run in (first, second))
    assert torch.equal(torch.stack(ours[skip:]), torch.stack(theirs))
    assert torch.equal(first["weights"], second["weights"])
    assert first["manager"]["sizes"] == second["manager"]["sizes"]
    assert first["manager"]["steps"] == second["manager"]["steps"]
    for name, value in first["manager"]["buffer"]["slots"].items():
        other = second["manager"]["buffer"]["slots"][name]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    for name, value in first["rows"].items():
        assert torch.equal(value, second["rows"][name]), name


def test_blocking_is_inline_bit_for_bit(runs: list[dict[str, Any]]) -> None:
    for worker in runs:
        assert_same_run(worker["global inline"], worker["global blocking"])


def test_every_worker_rehearses_as_many_as_the_union_has_up_to_r(runs: list[dict[str, Any]]) -> None:
    workers = of(runs, "global inline")
    steps = [run["steps"] for run in workers]
    assert len(steps[0]) == len(steps[1]) == 14
    known = [0]  # rows of the union when the exchange of each step began
    for k, step in enumerate(steps[0]):
        first = k == 0 or step["epoch"] != steps[0][k - 1]["epoch"]
        known.append(sum(s[k if first else k - 1]["stored"] for s in steps))
    expected = [min(R, n) for n in known[:-1]]
    assert [rehearsed(run) for run in workers] == [expected] * 2
    assert expected[0] == 0
    assert expected[-6:] == [R] * 6


def test_stored_is_what_the_worker_met_itself_and_no_padding(runs: list[dict[str, Any]]) -> None:
    for name in ("global blocking", "local none", "preset"):
        for worker in of(runs, name):
            met = [s["sample_ids"][: s["num_new"]][s["weights"][: s["num_new"]] > 0] for s in worker["steps"]]
            assert len(worker["ids"]) <= worker["capacity"]
            assert set(worker["ids"].tolist()) <= set(torch.cat(met).tolist())
            assert int(worker["manager"]["buffer"]["slots"]["seen"]) == len(torch.cat(met))
        assert sum(run["capacity"] for run in of(runs, name)) == (13 if name != "preset" else 60 * 6 * 2)
    # Rows of the other worker are rehearsed under global scope, and never under local.
    for name, foreign in (("global blocking", True), ("local none", False)):
        for worker in of(runs, name):
            met: set[int] = set()
            borrowed = False
            for s in worker["steps"]:
                borrowed |= not set(s["sample_ids"][s["num_new"] :].tolist()) <= met
                met |= set(s["sample_ids"][: s["num_new"]].tolist())
            assert borrowed is foreign


@pytest.mark.parametrize("name", ["global blocking", "global none", "local none", "local sum", "preset"])
def test_the_job_is_one_process_on_the_rows_of_both(runs: list[dict[str, Any]], name: str) -> None:
    """Loss and steps from the definition: the weighted mean over all rows of both workers, SGD with momentum."""
    workers = of(runs, name)
    assert torch.equal(workers[0]["weights"], workers[1]["weights"])
    agent = nil(MLP([8]), 6, input_spec=(1, 4, 4))
    torch.nn.utils.vector_to_parameters(workers[0]["first"].clone(), agent.parameters())
    optimizer, task = torch.optim.SGD(agent.parameters(), 0.05, 0.9), 0
    for steps in zip(*(run["steps"] for run in workers), strict=True):
        if steps[0]["task"] != task:
            task = steps[0]["task"]
            optimizer.state.clear()
        new, old = torch.zeros(2), torch.zeros(2)
        for s in steps:
            each = F.cross_entropy(agent(s["inputs"]), s["targets"], reduction="none")
            n = s["num_new"]
            w = s["weights"] if "none" not in name and "sum" not in name else (s["weights"] > 0).float()
            new = new + torch.stack([(w * each)[:n].sum(), w[:n].sum()])
            old = old + torch.stack([(w * each)[n:].sum(), w[n:].sum()])
        loss = (new[0] + old[0]) / (new[1] + old[1])
        if name == "local sum":
            loss = new[0] / new[1] + (old[0] / old[1] if old[1] > 0 else 0)
        torch.testing.assert_close((steps[0]["loss"] + steps[1]["loss"]) / 2, loss.detach(), atol=1e-5, rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    torch.testing.assert_close(final, workers[0]["weights"], atol=1e-5, rtol=1e-5)
    # The case that is easily got wrong: one worker rehearses and the other has nothing to.
    pairs = [tuple(len(s["targets"]) - s["num_new"] for s in both) for both in zip(*(w["steps"] for w in workers))]  # noqa: B905
    assert any(a > 0 and b == 0 for a, b in pairs) is name.startswith("local")


def test_resume_equals_the_uninterrupted_run(runs: list[dict[str, Any]]) -> None:
    for worker in runs:
        assert_same_run(worker["global saved"], worker["global blocking"])
        for name in ("global", "local"):
            for step in (4, 8, 10):
                assert_same_run(worker[f"{name} saved"], worker[f"{name} from {step}"], skip=step)


def test_nonblocking_under_global_scope_is_refused(runs: list[dict[str, Any]]) -> None:
    assert all("scope=local" in message for message in of(runs, "refused"))


def test_one_memory_over_a_fit_for_each_task() -> None:
    assert_ended_well(run_workers(rehearsal.several_fits, WORKERS))
