"""``data.passes``: each batch several times in a row, each time with other draws, and once into the memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from dcl_lightning import cli
from dcl_lightning.data import transforms
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import Batch
from tests.conformance.agents import make
from tests.conformance.small_stream import make_agent, make_data, make_trainer, matrix, weights
from tests.distributed.programs.streams import passes_run
from tests.distributed.workers import assert_ended_well, run_workers


def loader(count: int, batch_size: int, rank: int = 0, size: int = 1, passes: int = 1) -> TaskLoader:
    rows = torch.arange(count)
    made = TaskLoader(rows[:, None], rows, rows * 0, batch_size, rows, rank, size, train=True, epoch=4)
    made.passes = passes
    return made


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 7), st.integers(1, 4), st.integers(0, 60))
def test_each_batch_comes_as_often_in_a_row_and_any_place_resumes(
    count: int, size: int, batch_size: int, passes: int, stop: int
) -> None:
    one = list(loader(count, size * batch_size, passes=passes))
    for rank in range(size):
        plain, several = (list(loader(count, batch_size, rank, size, n)) for n in (1, passes))
        walked = loader(count, batch_size, rank, size, passes)
        assert len(walked) == len(several) == passes * len(plain)
        for step, batch in enumerate(several):
            number, index = divmod(step, passes)
            assert batch.passes_left == passes - 1 - index
            for name in ("inputs", "targets", "task_ids", "sample_ids", "weights", "normalizer", "num_new"):
                found, expected = getattr(batch, name), getattr(plain[number], name)
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), name
            assert torch.equal(batch.draw_ids, plain[number].draw_ids) == (index == 0)
            # A sample has the same draws on any number of workers.
            drawn = dict(zip(one[step].sample_ids.tolist(), one[step].draw_ids.tolist(), strict=True))
            real = batch.weights > 0
            ours = zip(batch.sample_ids[real].tolist(), batch.draw_ids[real].tolist(), strict=True)
            assert all(drawn[sample] == draw for sample, draw in ours)
        walk = iter(walked)
        for _ in range(min(stop, len(several))):
            next(walk)
        again = loader(count, batch_size, rank, size, passes)
        again.load_state_dict(walked.state_dict())
        rest = [(b.sample_ids.tolist(), b.draw_ids.tolist()) for b in again]
        assert rest == [(b.sample_ids.tolist(), b.draw_ids.tolist()) for b in several[min(stop, len(several)) :]]


def test_no_pass_repeats_the_draws_of_another() -> None:
    batches = [b for b in loader(400, 400, passes=3)]
    crops = torch.stack([transforms.draws(b.draw_ids, 0, 4, 0, 9) for b in batches])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        equal = (crops[one] == crops[other]).double().mean()
        assert abs(float(equal) - 1 / 9) < 5 * (8 / 81 / 400) ** 0.5


@pytest.mark.parametrize("passes", [0, -1, 2.5, True, "3", 10_001])
def test_what_is_no_number_of_passes_is_refused(passes: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.passes=.*whole number of at least 1"):
        make_data(passes=passes)


class Recorder:
    """Keeps each step's batch and logits."""

    def __init__(self, agent: Any) -> None:
        self.batches: list[Batch] = []
        self.logits: list[Tensor] = []
        inner = agent.training_loss

        def training_loss(batch: Batch) -> tuple[Tensor, Tensor]:
            loss, logits = inner(batch)
            self.batches.append(batch)
            self.logits.append(logits.detach().clone())
            return loss, logits

        agent.training_loss = training_loss


def test_training_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    data = make_data(scenario="none", passes=3, augment=False)
    agent = make_agent("base", data, epochs_per_task=2)
    net = nn.Sequential(copy.deepcopy(agent.backbone), copy.deepcopy(agent.head))
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    x, y = data.train_inputs, data.train_targets
    for epoch in range(2):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch))  # data.seed is 0
        for rows in order.split(5):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(weights(agent), expected, rtol=1e-4, atol=1e-5)


def test_two_passes_of_one_step_are_one_pass(tmp_path: Path) -> None:
    """The mean of two equal gradients is the gradient."""
    found = []
    for passes in (1, 2):
        data = make_data(passes=passes)
        agent = make_agent("base", data, epochs_per_task=2)
        make_trainer(tmp_path, limit_val_batches=0, accumulate_grad_batches=passes).fit(agent, datamodule=data)
        found.append((weights(agent), agent.trainer.global_step))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    "memory",
    [
        {"policy": "reservoir"},
        {"policy": "reservoir", "execution": "blocking", "scope": "global"},
        {"policy": "class_balanced", "row_format": "augmented", "execution": "blocking"},
        {"policy": "class_balanced", "row_format": "index", "prefetch": "batch", "execution": "blocking"},
    ],
    ids=str,
)
def test_each_pass_draws_for_itself_and_the_memory_gets_the_batch_once(memory: dict, tmp_path: Path) -> None:
    data = make_data(passes=3, augment=True)
    agent = make("er", data, memory=memory, epochs_per_task=2)
    seen = Recorder(agent)
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    assert [b.passes_left for b in seen.batches] == [2, 1, 0] * (len(seen.batches) // 3)
    other, stored = 0, set()
    for first in range(0, len(seen.batches), 3):
        three = seen.batches[first : first + 3]
        new = [b.sample_ids[: b.num_new].tolist() for b in three]
        assert new[0] == new[1] == new[2]
        assert not torch.equal(three[0].inputs[: len(new[0])], three[1].inputs[: len(new[0])])
        rehearsed = [b.sample_ids[b.num_new :].tolist() for b in three]
        other += len(set(map(tuple, rehearsed))) > 1
        # A batch is rehearsed from the next one's first pass on.
        assert stored.issuperset(sample for ids in rehearsed for sample in ids)
        stored |= set(new[0])
    assert other > 10
    buffer = agent.rehearsal.manager.buffer
    assert buffer.state.offers == len(seen.batches) // 3
    assert int(buffer.offered.sum()) == 2 * len(data.train_targets)
    assert agent.rehearsal.manager.steps >= len(seen.batches) - 6  # each draws; an epoch's last step does not


def test_what_an_agent_stores_is_of_the_last_pass(tmp_path: Path) -> None:
    data = make_data(passes=3)
    agent = make("derpp", data, epochs_per_task=1)
    seen = Recorder(agent)
    make_trainer(tmp_path, limit_val_batches=0).fit(agent, datamodule=data)
    last: dict[int, Tensor] = {}
    for batch, logits in zip(seen.batches, seen.logits, strict=True):
        if not batch.passes_left:
            last |= dict(zip(batch.sample_ids[: batch.num_new].tolist(), logits[: batch.num_new], strict=True))
    buffer = agent.rehearsal.manager.buffer
    rows = buffer.store.gather(buffer.slots_at(torch.arange(len(buffer))))
    assert len(rows["sample_ids"]) == 12
    for sample, logits in zip(rows["sample_ids"].tolist(), rows["logits"], strict=True):
        assert torch.equal(last[sample], logits)


def test_limits_count_each_pass(tmp_path: Path) -> None:
    data = make_data(passes=3)
    agent = make("er", data, memory={"update": "task_end"}, epochs_per_task=1)
    seen = Recorder(agent)
    make_trainer(tmp_path, limit_val_batches=0, limit_train_batches=4).fit(agent, datamodule=data)
    assert [b.passes_left for b in seen.batches] == [2, 1, 0, 2] * 3
    # The pass over a task's samples at its end takes as many as the epoch did: two batches of five.
    assert int(agent.rehearsal.manager.buffer.offered.sum()) == 3 * 10


def test_an_interval_of_validation_counts_each_pass(tmp_path: Path) -> None:
    def fit(passes: int) -> None:
        data = make_data(passes=passes, validate_on="test")
        trainer = make_trainer(tmp_path, val_check_interval=8)
        trainer.fit(make_agent("base", data, epochs_per_task=1), datamodule=data)

    fit(3)
    with pytest.raises(ConfigurationError, match="task 0 has only 3 batches"):
        fit(1)


def ids_stored(agent: Any) -> list[int]:
    rows = agent.memory_rows() if hasattr(agent, "exemplars") else agent.rehearsal.manager.memory_rows()
    return rows.sample_ids.tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("er", {}),
        ("er", {"memory": {"execution": "blocking", "scope": "global"}}),
        ("derpp", {"memory": {"execution": "blocking"}}),
        ("icarl", {"exemplars": "per_step", "num_samples": 3}),
        ("icarl", {}),
    ],
    ids=str,
)
def test_a_run_goes_on_between_two_passes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    def fit(folder: str, **kwargs: Any) -> Any:
        data = make_data(passes=3, augment=True)
        agent = make(name, data, **copy.deepcopy(options), epochs_per_task=1)
        saver = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        make_trainer(tmp_path, [saver], limit_val_batches=0).fit(agent, datamodule=data, **kwargs)
        return agent

    whole = fit("whole")
    for step in (2, 10, 13, 18):  # first and second pass of a batch, and a task's end
        again = fit(f"again{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert torch.equal(weights(again), weights(whole)), step
        assert ids_stored(again) == ids_stored(whole)
        assert torch.equal(matrix(again).nan_to_num(-1), matrix(whole).nan_to_num(-1))


def fitted(folder: Path, ckpt: Path | None = None, **kwargs: Any) -> tuple[Any, Recorder]:
    data = make_data(**kwargs)
    agent = make_agent("base", data, epochs_per_task=1)
    seen = Recorder(agent)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(folder, [saver], limit_val_batches=0).fit(agent, datamodule=data, ckpt_path=ckpt)
    return agent, seen


def test_another_number_of_passes_is_another_run(tmp_path: Path) -> None:
    fitted(tmp_path / "three", passes=3)
    with pytest.raises(ConfigurationError, match="run had passes 3, this one has 1"):
        fitted(tmp_path / "refused", tmp_path / "three" / "step=4.ckpt")
    whole, _ = fitted(tmp_path / "one")
    old = torch.load(tmp_path / "one" / "step=4.ckpt", weights_only=True)
    del old["ContinualDataModule"]["stream"]["passes"]
    torch.save(old, tmp_path / "old.ckpt")
    again, _ = fitted(tmp_path / "again", tmp_path / "old.ckpt")
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ConfigurationError, match="run had passes 1, this one has 2"):
        fitted(tmp_path / "refused", tmp_path / "old.ckpt", passes=2)


@pytest.mark.parametrize("batch_size", [3, 7])
def test_with_another_batch_size_it_goes_on_with_a_whole_batch(batch_size: int, tmp_path: Path) -> None:
    """Tasks of 14 samples: of a task's nine steps with five samples, each."""
    fitted(tmp_path / "s", batch_size=5, passes=3)
    _, wanted = fitted(tmp_path / "whole", batch_size=batch_size, passes=3)
    for step in range(10, 18):
        whole_batches = (step - 9) // 3 * 5 // batch_size
        first = 3 * (-(-14 // batch_size) + whole_batches)
        _, seen = fitted(tmp_path / "again", tmp_path / "s" / f"step={step}.ckpt", batch_size=batch_size, passes=3)
        found, expected = (
            [(b.passes_left, b.sample_ids.tolist()) for b in batches] for batches in (seen.batches, wanted.batches)
        )
        assert found == expected[first:], step


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("data: {init_args: {passes: 3, batch_size: 100}}\n")
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    assert cli.main(["fit", "--config", "a.yaml", *quiet]) == 0
    facts = json.loads((tmp_path / "report" / "accuracy_matrix.json").read_text())
    assert facts["optimizer_steps"] == 3 * sum(-(-samples // 100) for samples in facts["task_samples"])
    assert facts["samples_seen"]["new"] == 3 * 1437


def test_two_workers_are_one_with_the_doubled_batch(tmp_path: Path) -> None:
    assert_ended_well(run_workers(passes_run, 2, tmp_path, "horovod", 3))
    passes_run(tmp_path, "auto", 6)
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("auto0", "horovod0", "horovod1")
    )
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-4, atol=1e-5)
    for k in range(len(one["new"])):
        pair = sorted(first["new"][k] + second["new"][k])
        assert pair == sorted(one["new"][k])
    # With representatives of both: each worker draws in each pass, and both memories together got each sample once.
    rehearsed = [worker["rehearsed"] for worker in (first, second)]
    for drawn in rehearsed:
        three = [drawn[k : k + 3] for k in range(0, len(drawn), 3)]
        assert sum(len(set(map(tuple, draws))) > 1 for draws in three) > len(three) // 2
    assert torch.equal(first["rehearsing"], second["rehearsing"])
    assert first["offered"] + second["offered"] == one["offered"] == 42
