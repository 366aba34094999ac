"""Streams beyond class and domain: blurry ones, orders and cuts by seed, fixed shards, concatenated tasksets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcl_lightning.data import ContinualDataModule, scenarios
from dcl_lightning.errors import ConfigurationError

T10 = np.repeat(np.arange(10), 40)


def make(labels=T10, **kwargs) -> ContinualDataModule:
    x = np.arange(len(labels), dtype=np.float32)[:, None]
    data = ContinualDataModule((x, labels, x, labels), **({"batch_size": 8, "seed": 0} | kwargs))
    data.setup()
    return data


def counts(data) -> np.ndarray:
    """Training samples of each class (columns) in each task (rows)."""
    tasks = [data.train_targets[data.train_indices(t)] for t in range(data.num_tasks)]
    return np.stack([np.bincount(y, minlength=data.num_classes) for y in tasks])


class OneEpochATask:
    def task_at(self, epoch: int) -> int:
        return epoch


def at(data, epoch: int, rank: int, size: int):
    root = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, world_size=size, training=True, strategy=root)
    if data.clock is None:
        data.attach_clock(OneEpochATask())
    return data


# -- blurry ------------------------------------------------------------------------------------------------------------


def test_a_share_of_each_class_leaks_evenly_into_the_other_tasks_and_nowhere_into_the_test_sets() -> None:
    data = make(scenario="blurry", blurriness=0.1, increment=2)
    table = counts(data)
    assert table.sum(0).tolist() == [40] * 10
    assert table.sum(1).tolist() == [80] * 5
    home = np.repeat(np.arange(5), 2)
    assert all(table[home[y], y] == 36 for y in range(10))
    assert all(table[t, y] == 1 for y in range(10) for t in range(5) if t != home[y])
    for t, loader in enumerate(data.test_dataloader()):
        assert set(data.test_targets[loader.indices].tolist()) == {2 * t, 2 * t + 1}
    task = data.tasks([1] * 5)[1]
    assert task.classes == tuple(range(10))
    assert task.leaked == (0, 1, 4, 5, 6, 7, 8, 9)


def test_what_leaks_is_chosen_by_the_seed() -> None:
    first, again, other = (make(scenario="blurry", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.stream.train_parts, again.stream.train_parts)
    assert not torch.equal(first.stream.train_parts, other.stream.train_parts)
    assert (counts(first) == counts(other)).all()


def test_a_resumed_run_takes_the_leaks_of_its_own_seed_back() -> None:
    first, second = make(scenario="blurry", seed=0), make(scenario="blurry", seed=1)
    second.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.stream.train_parts, second.stream.train_parts)
    with pytest.raises(ConfigurationError, match=r"blurry 0.1.*blurry 0.3"):
        at_fit(make(scenario="blurry", blurriness=0.3)).load_state_dict(first.state_dict())


def test_a_run_is_not_resumed_with_tasks_of_other_sizes() -> None:
    saved = make(concatenate_tasksets=True).state_dict()
    at_fit(make(concatenate_tasksets=True)).load_state_dict(saved)
    with pytest.raises(ConfigurationError, match=r"concatenate_tasksets True, this one has False"):
        at_fit(make()).load_state_dict(saved)


def at_fit(data):
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    return data


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0, 0.99), st.integers(0, 3), st.integers(1, 6))
def test_leaks_of_any_labels(labels: list[int], share: float, seed: int, increment: int) -> None:
    targets = np.unique(labels, return_inverse=True)[1]
    home = np.arange(targets.max() + 1) // increment
    parts = scenarios.blurred(targets, home, share, seed)
    for y in range(len(home)):
        members = parts[targets == y]
        leaking = int((members != home[y]).sum())
        expected = min(round(share * len(members)), len(members) - 1) if home.max() else 0
        assert leaking == expected
        away = np.bincount(members[members != home[y]], minlength=home.max() + 1)
        others = np.delete(away, home[y])
        assert not len(others) or others.max() - others.min() <= 1


def test_hold_outs_of_a_blurry_stream_are_of_every_class_that_can_spare_one() -> None:
    data = make(scenario="blurry", blurriness=0.3, val_ratio=0.25)
    for t in range(5):
        held, kept = data.stream.held_indices(t), data.train_indices(t)
        assert not set(held.tolist()) & set(kept.tolist())
        assert set(data.train_targets[held].tolist()) == set(data.train_targets[kept].tolist())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"scenario": "blurry", "blurriness": 1.0}, r"data\.blurriness=1.0.*0 to below 1"),
        ({"scenario": "blurry", "blurriness": -0.1}, r"data\.blurriness=-0.1"),
        ({"blurriness": 0.1}, r"data\.blurriness=0.1.*scenario=class.*blurry"),
        ({"scenario": "domain", "initial_increment": 2}, r"data\.initial_increment=2.*scenario=domain.*class"),
        ({"scenario": "none", "initial_increment": 2}, r"data\.initial_increment=2.*scenario=none.*class"),
        ({"sample_order": "shuffled"}, r"data\.sample_order=shuffled.*domain"),
        ({"sample_order": "random", "scenario": "domain"}, r"data\.sample_order='random'.*shuffled"),
        ({"scenario": "klass"}, r"data\.scenario='klass'.*blurry"),
        ({"boundaries": "none"}, r"data\.boundaries='none'.*hidden"),
        ({"sharding": "each"}, r"data\.sharding='each'.*fixed"),
        ({"class_order": "alphabetic"}, r"data\.class_order='alphabetic'.*random"),
        ({"class_order": -1}, r"data\.class_order=-1"),
    ],
)
def test_values_that_do_not_go_with_a_scenario(kwargs, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make(**kwargs)


# -- orders and cuts ---------------------------------------------------------------------------------------------------


def test_class_orders_by_seed() -> None:
    by_run = [make(class_order="random", seed=seed).original_labels for seed in (0, 0, 1)]
    assert by_run[0] == by_run[1] != by_run[2]
    assert sorted(by_run[0]) == list(range(10))
    given = [make(class_order=7, seed=seed).original_labels for seed in (0, 1)]
    assert given[0] == given[1]
    names = make(np.repeat(["b", "a", "c"], 4), class_order=3, increment=1)
    assert sorted(names.original_labels) == ["a", "b", "c"]


def test_the_published_order_is_a_seeds() -> None:
    hundred = make(np.repeat(np.arange(100), 2), class_order=1993, increment=10)
    assert hundred.original_labels == scenarios.named_class_order("icarl_1993")
    named = make(np.repeat(np.arange(100), 2), class_order="icarl_list", increment=10, initial_increment=50)
    assert named.num_tasks == 6
    assert named.tasks([1] * 6)[0].labels[:5] == (87, 0, 52, 58, 44)


def test_the_first_task_may_have_more_classes() -> None:
    data = make(initial_increment=4, increment=3)
    assert [task.classes for task in data.tasks([1] * 3)] == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert [len(data.train_indices(t)) for t in range(3)] == [160, 120, 120]


def test_a_domain_is_cut_in_order_or_shuffled_by_the_seed() -> None:
    in_order = make(scenario="domain", num_tasks=4)
    assert data_of(in_order, 0, 3) == list(range(120, 130))
    cuts = [make(scenario="domain", num_tasks=4, sample_order="shuffled", seed=seed) for seed in (0, 0, 1)]
    assert data_of(cuts[0], 0, 3) == data_of(cuts[1], 0, 3) != data_of(cuts[2], 0, 3)
    for data in cuts:
        assert (counts(data) == 10).all()
        assert torch.equal(data.stream.test_parts, in_order.stream.test_parts)


def data_of(data, task: int, label: int) -> list[int]:
    ids = data.train_indices(task)
    return ids[data.train_targets[ids] == label].tolist()


@pytest.mark.parametrize("scenario", ["class", "blurry", "domain"])
def test_concatenated_tasksets_hold_all_tasks_so_far(scenario: str) -> None:
    data = make(scenario=scenario, concatenate_tasksets=True, increment=2, val_ratio=0.25)
    so_far: set[int] = set()
    for t in range(5):
        so_far |= set(data.train_indices(t).tolist())
        loader = at(data, t, 0, 1).train_dataloader()
        data.task_id = t
        assert set(torch.cat([b.sample_ids for b in loader]).tolist()) <= so_far
    assert not so_far & set(torch.nonzero(data.stream.held).flatten().tolist())


# -- shards ------------------------------------------------------------------------------------------------------------


class TwoEpochsATask:
    def task_at(self, epoch: int) -> int:
        return epoch // 2


def shards(data, epoch: int, size: int) -> list[list[int]]:
    data.attach_clock(TwoEpochsATask())
    result, normalisers = [], []
    for rank in range(size):
        loader = at(data, epoch, rank, size).train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        result.append(torch.cat([b.sample_ids[b.weights > 0] for b in batches]).tolist())
        normalisers.append([float(b.normalizer) for b in batches])
        data._train_loader = None
    assert all(one == normalisers[0] for one in normalisers)
    return result


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=60), st.integers(1, 4), st.booleans(), st.sampled_from([0, 0.3])
)
def test_fixed_shards_keep_each_sample_on_one_worker(labels, size, concatenate, val_ratio) -> None:
    y = np.unique(labels, return_inverse=True)[1]
    data = make(y, increment=1, sharding="fixed", concatenate_tasksets=concatenate, val_ratio=val_ratio, batch_size=2)
    owner: dict[int, int] = {}
    for epoch in range(2 * data.num_tasks):
        parts = shards(data, epoch, size)
        first = 0 if concatenate else data.task_id
        own = torch.cat([data.train_indices(t) for t in range(first, data.task_id + 1)])
        assert sorted(i for part in parts for i in part) == sorted(own.tolist())
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for rank, part in enumerate(parts):
            assert all(owner.setdefault(i, rank) == rank for i in part)


def test_the_order_within_a_fixed_shard_changes_with_the_epoch_and_one_worker_has_the_usual_one() -> None:
    first, second = (shards(make(sharding="fixed"), epoch, 2)[0] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    usual = [shards(make(sharding="epoch"), epoch, 2)[0] for epoch in (0, 1)]
    assert sorted(usual[0]) != sorted(usual[1])
    assert shards(make(sharding="fixed"), 0, 1) == shards(make(sharding="epoch"), 0, 1)


def test_weights_of_a_step_are_those_of_all_workers() -> None:
    """The loss of a worker divides by what all workers have in the step, also where one has run out of samples."""
    data = make(np.zeros(24, dtype=int), increment=1, sharding="fixed", batch_size=4)
    data.stream.owners = lambda size, seed: torch.tensor([0] * 17 + [1] * 7)
    loaders = []
    for rank in range(2):
        loaders.append(list(at(data, 0, rank, 2).train_dataloader()))
        data._train_loader = None
    assert [len(batches) for batches in loaders] == [5, 5]
    for one, other in zip(*loaders, strict=True):
        assert float(one.normalizer) == float(other.normalizer) == float(one.weights.sum() + other.weights.sum()) / 2
