"""iCaRL's exemplars, means and variants on the small stream."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from dcl_lightning import ContinualDataModule, ICaRL
from dcl_lightning.backbones import MLP
from dcl_lightning.errors import ConfigurationError, DataError
from dcl_lightning.functional import distillation
from dcl_lightning.memory.config import MemorySize
from tests.conformance.small_stream import arrays, make_agent, make_data, make_trainer, matrix, weights


def fit(tmp_path: Path, data=None, **kwargs):
    data = data or make_data()
    agent = make_agent("icarl", data, **kwargs)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    return agent


@pytest.mark.parametrize("exemplars", ["union", "per_step"])
def test_blocking_equals_inline_bit_for_bit(tmp_path: Path, exemplars: str) -> None:
    one, two = (fit(tmp_path, exemplars=exemplars, execution=e) for e in ("inline", "blocking"))
    assert torch.equal(weights(one), weights(two))
    assert torch.equal(matrix(one).nan_to_num(-1), matrix(two).nan_to_num(-1))


def test_per_step_adds_exemplars_of_earlier_tasks_to_each_batch(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data, exemplars="per_step", num_samples=3)
    steps: list[tuple[int, int, set[int]]] = []
    inner = agent.training_loss

    def spy(batch):
        rehearsed = batch.targets[batch.num_new :].tolist()
        steps.append((agent.clock.task_at(agent.trainer.current_epoch), len(rehearsed), set(rehearsed)))
        assert float(batch.normalizer) == float(batch.weights.sum())
        return inner(batch)

    agent.training_loss = spy
    make_trainer(tmp_path).fit(agent, datamodule=data)
    assert len(steps) == 18
    assert all(count == (3 if task else 0) for task, count, _ in steps)
    assert all(max(labels, default=-1) < 2 * task for task, _, labels in steps)


def test_the_original_programs_variant_trains(tmp_path: Path) -> None:
    agent = fit(tmp_path, exemplars="per_step", loss="kl", selection="nearest", epochs_per_task=4)
    assert float(agent.clock.matrix.average_accuracy) > 0.5


def test_kl_needs_exemplars_per_step() -> None:
    data = make_data()
    with pytest.raises(ConfigurationError, match="per_step"):
        make_agent("icarl", data, loss="kl")


def test_cross_entropy_and_distillation_on_all_samples(tmp_path: Path) -> None:
    data = make_data()
    agent = make_agent("icarl", data, loss="ce", train_classes="seen")
    inner, checked = agent.training_loss, []

    def spy(batch):
        loss, logits = inner(batch)
        task = agent.clock.task_at(agent.trainer.current_epoch)
        known, seen = 2 * task, 2 * (task + 1)  # two classes a task, in order
        expected = torch.nn.functional.cross_entropy(logits[:, :seen], batch.targets)
        if task:
            p = (agent.teacher(batch.inputs)[:, :known] / 2).softmax(1)
            expected = expected - (p * (logits[:, :known] / 2).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss, expected)
        checked.append((task, bool((batch.targets < known).any())))
        return loss, logits

    agent.training_loss = spy
    make_trainer(tmp_path).fit(agent, datamodule=data)
    assert {task for task, _ in checked} == {0, 1, 2}
    assert (2, True) in checked  # exemplars among the batch


def test_distillation_against_numpy() -> None:
    logits, teacher = torch.randn(5, 4), torch.randn(5, 4)

    def softmax(x):
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher.numpy()), softmax(logits.numpy())
    assert float(distillation(logits, teacher)) == pytest.approx((p * np.log(p / q)).sum() / 5, rel=1e-5)


def test_all_of_the_memory_is_divided_among_the_classes_seen_so_far(tmp_path: Path) -> None:
    kept: list[dict[int, list[int]]] = []
    trained: list[set[int]] = [set() for _ in range(3)]

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, agent, outputs, batch, batch_idx) -> None:
            trained[agent.clock.task_at(trainer.current_epoch)] |= set(batch.sample_ids.tolist())

        def on_task_evaluated(self, trainer, agent, task) -> None:
            kept.append({y: ids.tolist() for y, ids in agent.exemplars.items()})

    data = make_data()  # two classes a task, 7 samples each
    make_trainer(tmp_path, [Look()]).fit(make_agent("icarl", data), datamodule=data)  # room for 12
    sizes = [{y: len(ids) for y, ids in exemplars.items()} for exemplars in kept]
    assert sizes == [dict.fromkeys(range(2), 6), dict.fromkeys(range(4), 3), dict.fromkeys(range(6), 2)]
    for task, before in enumerate([{}, *kept[:2]]):
        # Each task trains on its own samples and on the exemplars that there are; of these the first are kept.
        own = set(data.train_indices(task).tolist())
        assert trained[task] == own.union(*before.values())
        assert all(kept[task][y] == ids[: len(kept[task][y])] for y, ids in before.items())


def test_a_class_with_fewer_samples_than_its_quota(tmp_path: Path) -> None:
    x, y, _, _ = arrays()
    keep = torch.ones(len(y), dtype=torch.bool)
    keep[torch.nonzero(y == 1).flatten()[1:]] = False
    data = ContinualDataModule((x[keep], y[keep], x, y), increment=2, batch_size=5, seed=0)
    agent = fit(tmp_path, data)
    assert len(agent.exemplars[1]) == 1
    assert all(len(ids) == 2 for label, ids in agent.exemplars.items() if label != 1)


def test_a_memory_larger_than_the_data_holds_each_sample_once(tmp_path: Path) -> None:
    data = make_data()
    agent = ICaRL(MLP([8]), 6, rehearsal=MemorySize(buffer_size=1000), input_spec=data.input_spec, epochs_per_task=1)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    assert sorted(agent.exemplar_ids().tolist()) == list(range(42))


def test_classes_that_come_again_are_chosen_anew(tmp_path: Path) -> None:
    data = make_data(scenario="domain", num_tasks=3)
    agent = fit(tmp_path, data)
    assert sorted(agent.exemplars) == list(range(6))
    assert agent.clock.schedule.evaluated == 3
    origin = data.stream.train_parts[agent.exemplar_ids()]
    assert len(set(origin.tolist())) > 1, "exemplars come from the old ones and from the new samples"


def test_means_are_those_of_the_exemplars_under_the_present_network(tmp_path: Path) -> None:
    agent = fit(tmp_path)
    data = agent.trainer.datamodule
    for label, ids in agent.exemplars.items():
        with torch.no_grad():
            phi = torch.nn.functional.normalize(agent.eval().features(data.train_inputs[ids]).double(), dim=1)
        mean = torch.nn.functional.normalize(phi.mean(0), dim=0).float()
        torch.testing.assert_close(agent.means[label], mean, atol=1e-6, rtol=1e-5)


def test_training_that_has_diverged_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task 0.* is not finite.*model\.lr than 1e\+20"):
        fit(tmp_path, lr=1e20)
