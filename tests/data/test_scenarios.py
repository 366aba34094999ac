"""Scenarios and labels: the troubles that people had with them, each refused or made right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcl_lightning.data import ContinualDataModule, scenarios
from dcl_lightning.data.class_orders import named_class_order
from dcl_lightning.errors import ConfigurationError, DataError


def images(labels, **kwargs):
    x = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    data = ContinualDataModule((x, labels, x, labels), **kwargs)
    data.setup()
    return data


T10 = np.repeat(np.arange(10), 4)


@pytest.mark.parametrize(
    ("increment", "initial", "sizes"),
    [
        (7, None, [7, 3]),
        ([7, 3], None, [7, 3]),
        ((5, 5), None, [5, 5]),
        (np.int64(5), None, [5, 5]),
        (np.array([5, 5]), None, [5, 5]),
        (3, 4, [4, 3, 3]),
    ],
)
def test_increments(increment, initial, sizes) -> None:
    """Case A2."""
    assert [len(c) for c in scenarios.class_tasks(10, increment, initial)] == sizes


@pytest.mark.parametrize("increment", [[5, 4], [5, 0, 5], [12, -2], 0, -1, 2.5, True])
def test_wrong_increments_name_field_value_and_count(increment) -> None:
    """Case A2."""
    with pytest.raises(ConfigurationError, match=r"data\.increment.*10"):
        scenarios.class_tasks(10, increment)


def test_initial_increment_larger_than_the_classes() -> None:
    """Case A2."""
    with pytest.raises(ConfigurationError, match=r"data\.initial_increment=15.*10"):
        scenarios.class_tasks(10, 2, 15)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 11], ["missing [9]", "unknown [11]"]),
        ([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8], ["missing [9]", "unknown [-1]"]),
        ([0, 1, 2], ["missing"]),
        ([0, 0, *range(1, 10)], ["given twice [0]"]),
    ],
)
def test_wrong_class_orders(order, words) -> None:
    """Case A3."""
    with pytest.raises(ConfigurationError) as error:
        images(T10, class_order=order)
    assert all(word in str(error.value) for word in words)


def test_reports_speak_original_labels() -> None:
    """Case A4."""
    data = images(T10, class_order=list(range(9, -1, -1)), increment=5)
    tasks = data.tasks([1, 1])
    assert set(tasks[0].labels) == {5, 6, 7, 8, 9}
    assert set(T10[data.train_indices(0).numpy()]) == {5, 6, 7, 8, 9}


def test_test_split_that_lacks_classes_shifts_nothing() -> None:
    """Case A5."""
    x = np.zeros((40, 4), dtype=np.float32)
    keep = (T10 != 3) & (T10 != 4)
    data = ContinualDataModule((x, T10, x[keep], T10[keep]), increment=2)
    data.setup()
    rows = [loader.indices for loader in data.test_dataloader()]
    assert len(rows) == 5
    assert set(T10[keep][rows[1].numpy()]) == {2}
    assert set(T10[keep][rows[4].numpy()]) == {8, 9}


@pytest.mark.parametrize(
    "labels", [np.repeat([10, 20, 30], 4), np.repeat([1, 2, 4], 4), ["b"] * 4 + ["a"] * 4 + ["c"] * 4]
)
def test_labels_with_gaps_or_names(labels) -> None:
    """Case A6."""
    data = images(labels, increment=1)
    assert data.num_tasks == 3
    assert [len(data.train_indices(t)) for t in range(3)] == [4, 4, 4]
    assert data.original_labels == sorted(set(np.asarray(labels).tolist()))
    assert data.train_targets.dtype == torch.int64


@pytest.mark.parametrize("labels", [T10.tolist(), torch.from_numpy(T10), T10.astype(np.float64), T10.astype(np.uint8)])
def test_label_types_that_work(labels) -> None:
    """Case A7."""
    assert images(labels).num_classes == 10


@pytest.mark.parametrize(("labels", "word"), [(T10 * 0.5, "0.5"), (T10 - 1, "-1"), (np.eye(10)[T10], "one-hot")])
def test_labels_that_are_refused(labels, word) -> None:
    """Case A7."""
    with pytest.raises(DataError, match=word):
        images(labels)


def test_float_images_stay_as_they_are() -> None:
    """Case A8."""
    x = np.random.default_rng(0).random((40, 8, 8, 3), dtype=np.float32)
    data = ContinualDataModule((x, T10, x, T10))
    data.setup()
    batch = data.prepare_batch(next(iter(data.train_dataloader())), train=True, epoch=0)
    assert float(batch.inputs.max()) > 0.9
    assert batch.inputs.shape[1:] == (3, 8, 8)


def test_hold_out_of_small_tasks_has_every_class_on_both_sides() -> None:
    """Case A11."""
    data = images(T10, increment=2, val_ratio=0.1)
    for t, loader in enumerate(ContinualDataModule.val_dataloader(_at_last_task(data))):
        held, kept = set(loader.indices.tolist()), set(data.train_indices(t).tolist())
        assert not held & kept
        assert set(T10[list(held)]) == set(T10[list(kept)]) == {2 * t, 2 * t + 1}


def _at_last_task(data):
    data.task_id = data.num_tasks - 1
    return data


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(1, 5))
def test_parts_cover_all_and_differ_by_one(labels, num_tasks) -> None:
    """Case A12."""
    parts = scenarios.part_of_samples(np.array(labels), num_tasks)
    sizes = np.bincount(parts, minlength=num_tasks)
    assert sizes.sum() == len(labels)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("name", ["icarl_1993", "icarl_list"])
def test_published_orders_are_permutations(name) -> None:
    order = named_class_order(name)
    assert sorted(order) == list(range(100))
    assert order[:5] == {"icarl_1993": [68, 56, 78, 8, 23], "icarl_list": [87, 0, 52, 58, 44]}[name]
