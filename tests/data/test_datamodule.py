"""The data module in a trainer: tasks, loaders, shards, validation sets, and batches on the device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn

from dcl_lightning.data import ContinualDataModule, scenarios, transforms
from dcl_lightning.data.loader import TaskLoader
from dcl_lightning.errors import ConfigurationError

T10 = np.repeat(np.arange(10), 4)


class TwoEpochsATask:
    def task_at(self, epoch: int) -> int:
        return epoch // 2


def make(labels=T10, **kwargs) -> ContinualDataModule:
    x = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    data = ContinualDataModule((x, labels, x, labels), **({"batch_size": 3} | kwargs))
    data.setup()
    data.attach_clock(TwoEpochsATask())
    return data


def in_trainer(data, epoch: int, rank: int = 0, size: int = 1, training: bool = True):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        current_epoch=epoch, global_rank=rank, world_size=size, training=training, strategy=strategy,
        precision_plugin=Precision(), state=SimpleNamespace(fn=TrainerFn.FITTING), num_devices=1, lightning_module=None,
    )  # fmt: skip
    return data


def ids(loader) -> list[int]:
    return sorted(torch.cat([b.sample_ids[b.weights > 0] for b in loader]).tolist())


def test_clock_says_the_task_and_the_loader_stays() -> None:
    data = make(validate_on="test")
    loaders = []
    for epoch in range(10):
        loader = in_trainer(data, epoch).train_dataloader()
        loaders.append(loader)
        assert data.task_id == epoch // 2
        assert ids(loader) == data.train_indices(data.task_id).tolist()
        assert {int(t) for b in loader for t in b.task_ids} == {data.task_id}
        assert [len(v) for v in data.val_dataloader()] == [1] * (data.task_id + 1)
    assert len(set(map(id, loaders))) == 1


def test_setup_again_keeps_the_task() -> None:
    data = make()
    in_trainer(data, 6).train_dataloader()
    data.setup("test")
    data.setup("fit")
    assert data.task_id == 3


def test_order_is_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([b.sample_ids for b in in_trainer(make(seed=seed), epoch).train_dataloader()]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_workers_share_every_set_exactly() -> None:
    data = make(increment=3, val_ratio=0.25)
    for epoch in (0, 2, 6):
        train, held, test = [], [], []
        for rank in range(3):
            train += ids(in_trainer(data, epoch, rank, 3).train_dataloader())
            held += [b.sample_ids for loader in data.val_dataloader() for b in loader]
            test += [b.sample_ids for loader in data.test_dataloader() for b in loader]
        assert sorted(train) == data.train_indices(data.task_id).tolist()
        assert not set(train) & set(torch.cat(held).tolist())
        assert sorted(torch.cat(test).tolist()) == list(range(40))
        data._train_loader = None


def test_another_trainer_or_batch_size_reaches_the_loader() -> None:
    data = make()
    assert len(in_trainer(data, 0).train_dataloader()) == 3
    data.batch_size = 8
    assert len(in_trainer(data, 0).train_dataloader()) == 1
    assert len(ids(in_trainer(data, 0, 1, 2).train_dataloader())) == 4


class Exemplars:
    """Two samples of task 0 are trained on again in task 1."""

    loads_ahead = False

    def __init__(self, per_batch: int | None = None) -> None:
        self.replayed_per_batch = per_batch

    def replayed_ids(self, task: int) -> torch.Tensor:
        return torch.tensor([0, 4] if task == 1 else [], dtype=torch.int64)


def test_replayed_samples_join_their_task_once() -> None:
    data = make()
    data.attach_replay(Exemplars())
    assert ids(in_trainer(data, 1).train_dataloader()) == list(range(8))
    assert ids(in_trainer(data, 2).train_dataloader()) == [0, 4, *range(8, 16)]
    both = make(concatenate_tasksets=True)
    both.attach_replay(Exemplars())
    assert ids(in_trainer(both, 2).train_dataloader()) == list(range(16))


def test_one_at_a_time_adds_to_the_batches_and_goes_when_the_fit_ends() -> None:
    data = make()
    first = Exemplars(per_batch=1)
    data.attach_replay(first)
    data.attach_replay(first)
    with pytest.raises(ConfigurationError, match="both add"):
        data.attach_replay(Exemplars())
    assert [b.num_new for b in in_trainer(data, 2).train_dataloader()] == [3, 3, 2]
    assert [len(b.targets) for b in in_trainer(data, 2).train_dataloader()] == [4, 4, 3]
    for leave in (lambda: data.teardown("fit"), lambda: data.on_exception(ValueError()), data.detach_replay):
        data.attach_replay(first)
        data.attach_clock(TwoEpochsATask())
        leave()
        data.attach_replay(Exemplars())
        data.detach_replay()
        data.attach_clock(TwoEpochsATask())
        assert ids(in_trainer(data, 2).train_dataloader()) == list(range(8, 16))


def test_tasks_say_what_they_hold() -> None:
    data = make(np.repeat(["d", "a", "c", "b"], 5), increment=3, val_ratio=0.2)
    first, last = data.tasks([4, 2])
    assert (first.classes, first.labels, first.num_samples, first.epochs) == ((0, 1, 2), ("a", "b", "c"), 12, 4)
    assert (last.index, last.num_tasks, last.classes, last.labels, last.num_samples) == (1, 2, (3,), ("d",), 4)


@pytest.mark.parametrize(("scenario", "num_tasks"), [("domain", 3), ("instance", 3), ("none", 1)])
def test_all_classes_in_every_task(scenario: str, num_tasks: int) -> None:
    data = make(scenario=scenario, **({} if scenario == "none" else {"num_tasks": 3}))
    assert data.num_tasks == num_tasks
    sizes = [len(data.train_indices(t)) for t in range(num_tasks)]
    assert sum(sizes) == 40
    assert max(sizes) - min(sizes) <= 1
    for t in range(num_tasks):
        assert set(data.train_targets[data.train_indices(t)].tolist()) == set(range(10))


def test_ten_samples_of_one_class_in_three_tasks() -> None:
    data = make(np.zeros(10, dtype=int), scenario="domain", num_tasks=3)
    assert [len(data.train_indices(t)) for t in range(3)] == [4, 3, 3]


def test_more_tasks_than_samples() -> None:
    with pytest.raises(ConfigurationError, match="task 3 has no training samples"):
        make(np.zeros(3, dtype=int), scenario="domain", num_tasks=4)


@pytest.mark.parametrize(
    "kwargs", [{"batch_size": 0}, {"eval_batch_size": 0}, {"num_tasks": 0}, {"val_ratio": 1.0}, {"val_ratio": -0.1}]
)
def test_impossible_numbers_are_refused(kwargs) -> None:
    (name,) = kwargs
    with pytest.raises(ConfigurationError, match=f"data.{name}"):
        ContinualDataModule("digits", **kwargs)


@pytest.mark.parametrize("value", [2.5, 64.0, True, "64", float("nan"), -1])
@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "num_tasks", "num_workers"])
def test_what_is_no_count_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.{name}=.*give a whole number of at least"):
        ContinualDataModule("digits", **{name: value})


@pytest.mark.parametrize("scenario", ["class", "blurry", "none"])
def test_a_number_of_tasks_that_would_change_nothing_is_refused(scenario: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.num_tasks=4 with data\.scenario={scenario}.*data\.increment"):
        ContinualDataModule("digits", scenario=scenario, num_tasks=4)


def test_a_batch_larger_than_the_data_is_one_short_batch() -> None:
    data = make(np.repeat(np.arange(2), 3), batch_size=1000)
    (batch,) = data.train_dataloader()
    assert sorted(batch.sample_ids.tolist()) == list(range(6))
    assert batch.weights.tolist() == [1.0] * 6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 5))
def test_hold_out_of_any_labels(labels: list[int], ratio: float, seed: int) -> None:
    targets = np.array(labels)
    parts = targets // 2
    held = scenarios.hold_out(targets, parts, ratio, seed)
    assert np.array_equal(held, scenarios.hold_out(targets, parts, ratio, seed))
    for y in np.unique(targets):
        members = targets == y
        assert (members & ~held).any()
        assert (members & held).any() == (ratio > 0 and members.sum() > 1)


def test_only_training_batches_are_augmented() -> None:
    data = make(augment=True)
    batch = next(iter(in_trainer(data, 0).train_dataloader()))
    plain = transforms.to_float(batch.inputs)
    assert not torch.equal(data.on_after_batch_transfer(batch, 0).inputs, plain)
    in_trainer(data, 0, training=False)
    out = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(out.inputs, plain)
    assert out.inputs.dtype == torch.float32
    assert batch.inputs.dtype == torch.uint8


def test_named_sets_are_normalised() -> None:
    data = ContinualDataModule("synthetic", source_options={"size": 8, "per_class": 8})
    data.setup()
    batch = next(iter(data.train_eval_loader(torch.arange(80))))
    inputs = data.prepare_batch(batch, train=False, epoch=0).inputs
    assert torch.allclose(inputs, (batch.inputs.float() / 255 - 0.5) / 0.25, atol=1e-5)


def test_no_sample_takes_anothers_draws_one_epoch_later() -> None:
    rows = torch.arange(2000)
    for stream, high in ((0, 9), (1, 9), (2, 2)):
        for shift in (1, 2, 7):
            now = transforms.draws(rows + shift, 0, 0, stream, high)
            for seed, epoch in ((0, shift), (0, 1), (shift, 0), (1, 0)):
                equal = (now == transforms.draws(rows, seed, epoch, stream, high)).double().mean()
                assert abs(float(equal) - 1 / high) < 5 * (high - 1) ** 0.5 / high / 2000**0.5


def test_draws_of_one_sample_are_independent() -> None:
    rows = torch.arange(81_000)
    tops, lefts = (transforms.draws(rows, 0, 0, stream, 9) for stream in (0, 1))
    counts = torch.bincount(tops * 9 + lefts, minlength=81).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 124.8  # chi-square, 80 degrees of freedom, p = 0.001
    flips = torch.stack([transforms.draws(torch.arange(50), 0, epoch, 2, 2) for epoch in range(400)]).double()
    assert float((flips.mean(0) - 0.5).abs().max()) < 0.1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 7), st.integers(0, 40))
def test_any_place_resumes_on_any_worker(count: int, size: int, batch_size: int, stop: int) -> None:
    def loader(rank: int) -> TaskLoader:
        rows = torch.arange(count)
        return TaskLoader(rows[:, None], rows, rows * 0, batch_size, rows, rank, size, train=True, epoch=4)

    for rank in range(size):
        first = loader(rank)
        whole = [b.sample_ids.tolist() for b in loader(rank)]
        stop = min(stop, len(whole))
        walk = iter(first)
        for _ in range(stop):
            next(walk)
        again = loader(rank)
        again.load_state_dict(first.state_dict())
        assert [b.sample_ids.tolist() for b in again] == whole[stop:]
        again.load_state_dict(first.state_dict())
        again.visit(torch.arange(count), 5)
        assert len(list(again)) == len(whole)


def test_options_are_what_was_given_and_can_be_written() -> None:
    data = make(increment=5, class_order=list(range(9, -1, -1)), root="there", transform=[torch.nn.Identity()])
    assert data.options == {"batch_size": 3, "increment": 5, "class_order": list(range(9, -1, -1))}
    assert make(batch_size=64).options == {}
