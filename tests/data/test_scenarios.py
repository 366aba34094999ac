"""Scenarios and labels: unusual input is refused or handled correctly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcl_lightning.data import ContinualDataModule, scenarios
from dcl_lightning.data.sources.arrays import check_labels
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
    assert [len(c) for c in scenarios.class_tasks(10, increment, initial)] == sizes


@pytest.mark.parametrize("increment", [[5, 4], [5, 0, 5], [12, -2], 0, -1, 2.5, True, [], "5", [[5], [5]]])
def test_wrong_increments_name_field_value_and_count(increment) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.increment.*10"):
        scenarios.class_tasks(10, increment)


@pytest.mark.parametrize("initial", [15, 0, -1])
def test_initial_increment_out_of_range(initial) -> None:
    with pytest.raises(ConfigurationError, match=rf"data\.initial_increment={initial}.*10"):
        scenarios.class_tasks(10, 2, initial)


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
    with pytest.raises(ConfigurationError) as error:
        images(T10, class_order=order)
    assert all(word in str(error.value) for word in words)


def test_reports_speak_original_labels() -> None:
    data = images(T10, class_order=list(range(9, -1, -1)), increment=5)
    tasks = data.tasks([1, 1])
    assert set(tasks[0].labels) == {5, 6, 7, 8, 9}
    assert set(T10[data.train_indices(0).numpy()]) == {5, 6, 7, 8, 9}


def test_test_split_that_lacks_classes_shifts_nothing() -> None:
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
    data = images(labels, increment=1)
    assert data.num_tasks == 3
    assert [len(data.train_indices(t)) for t in range(3)] == [4, 4, 4]
    assert data.original_labels == sorted(set(np.asarray(labels).tolist()))
    assert data.train_targets.dtype == torch.int64


@pytest.mark.parametrize("labels", [T10.tolist(), torch.from_numpy(T10), T10.astype(np.float64), T10.astype(np.uint8)])
def test_label_types_that_work(labels) -> None:
    assert images(labels).num_classes == 10


@pytest.mark.parametrize(("labels", "word"), [(T10 * 0.5, "0.5"), (T10 - 1, "-1"), (np.eye(10)[T10], "one-hot")])
def test_labels_that_are_refused(labels, word) -> None:
    with pytest.raises(DataError, match=word):
        images(labels)


NAMES = ["cat", "dog", "eel", "fox"]


def pandas_column(values, dtype=None):
    return pytest.importorskip("pandas").Series(values, dtype=dtype)


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), "", "  ", b"", np.datetime64("NaT", "D")])
@pytest.mark.parametrize("column", [list, tuple, lambda values: np.array(values, dtype=object)])
def test_missing_labels_among_names_are_refused(missing, column) -> None:
    with pytest.raises(DataError, match=r"training labels"):
        images(column(["cat", "dog", missing, "cat"]))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_labels_are_counted_and_the_first_is_named(missing) -> None:
    with pytest.raises(DataError, match=r"2 missing, the first in row 1 .*leave such samples out"):
        check_labels(np.array(["cat", missing, "dog", missing], dtype=object))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (["cat", None, "dog"], "string"),
        (["cat", None, "dog"], "category"),
        (["cat", None, "dog"], "object"),
        ([1, None, 2], "Int64"),
        ([1, None, 2], "float64"),
        ([True, None, False], "boolean"),
    ],
)
def test_missing_labels_in_a_column_of_pandas_are_refused(values, dtype) -> None:
    with pytest.raises(DataError, match="labels"):
        check_labels(pandas_column(values, dtype))


def test_columns_of_pandas_without_missing_labels_are_taken() -> None:
    assert check_labels(pandas_column(["b", "a"], "string")).tolist() == ["b", "a"]
    assert check_labels(pandas_column(["b", "a"], "category")).tolist() == ["b", "a"]
    assert check_labels(pandas_column([3, 1], "Int64")).tolist() == [3, 1]


@pytest.mark.parametrize("labels", [[0, None, 1], [0, float("nan"), 1], np.array([0, np.nan, 1], dtype=object)])
def test_missing_labels_among_numbers_are_refused(labels) -> None:
    with pytest.raises(DataError, match=r"labels.*(missing|nan)"):
        check_labels(labels)


def test_masked_labels_are_refused_and_arrays_without_a_mask_are_taken() -> None:
    with pytest.raises(DataError, match=r"labels: 1 missing, the first in row 2 \(masked\)"):
        check_labels(np.ma.masked_equal([0, 1, 9], 9))
    assert check_labels(np.ma.array([0, 1, 9])).tolist() == [0, 1, 9]


@pytest.mark.parametrize("labels", [["cat", 1], [1, "cat"], ["cat", 1.5], np.array(["cat", 1], dtype=object)])
def test_names_and_numbers_in_one_column_are_refused(labels) -> None:
    with pytest.raises(DataError, match="names and numbers"):
        check_labels(labels)


@pytest.mark.parametrize("labels", [["café", "dog"], [b"caf\xc3\xa9", b"dog"], np.array([b"caf\xc3\xa9", b"dog"])])
def test_bytes_are_read_as_utf_8(labels) -> None:
    assert check_labels(labels).tolist() == ["café", "dog"]
    assert check_labels(np.array(labels, dtype=object)).tolist() == ["café", "dog"]


def test_bytes_of_another_encoding_are_refused() -> None:
    with pytest.raises(DataError, match="UTF-8"):
        check_labels([b"caf\xe9", b"dog"])


def test_names_that_no_report_can_hold_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels: 'caf\\udce9' cannot be written as UTF-8"):
        check_labels(["caf\udce9", "dog"])


def test_names_that_differ_in_spaces_alone_are_refused() -> None:
    with pytest.raises(DataError, match=r"'cat' and 'cat ' differ in spaces"):
        check_labels(["dog", "cat ", "cat"])
    assert check_labels(["Cat", "cat"]).tolist() == ["Cat", "cat"]


def test_a_class_that_is_called_nan_is_warned_of() -> None:
    """An array of text cannot tell the name from what NumPy made of a missing label."""
    with pytest.warns(UserWarning, match="class is called 'nan'"):
        assert check_labels(np.array(["cat", "nan"])).tolist() == ["cat", "nan"]


@pytest.mark.parametrize("labels", [[0, 2**63], [0, 2**64], np.array([0, 2**63], dtype=np.uint64), [0.0, 1e300]])
def test_labels_that_int64_cannot_hold_are_refused(labels) -> None:
    with pytest.raises(DataError, match=r"2\*\*63"):
        check_labels(labels)


@pytest.mark.parametrize("labels", [[[0], [1, 2]], [{"a": 1}, {"b": 2}], [(1, 2), (3, 4)], [1j, 2j]])
def test_what_is_no_label_is_refused(labels) -> None:
    with pytest.raises(DataError, match="labels"):
        check_labels(labels)


def test_tensors_of_any_type_are_taken() -> None:
    wanted = [2, 0, 1]
    for labels in (
        torch.tensor(wanted, dtype=torch.bfloat16),
        torch.tensor([2.0, 0, 1], requires_grad=True),
        torch.tensor(wanted, dtype=torch.uint8)[:, None],
        [torch.tensor(label) for label in wanted],
    ):
        assert check_labels(labels).tolist() == wanted


@pytest.mark.parametrize(
    ("tasks", "test_tasks", "error", "words"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], ConfigurationError, "task 1 has no training samples.*from 0 without gaps"),
        ([1, 1, 2, 2], [1, 1, 2, 2], ConfigurationError, "task 0 has no training samples.*from 0 without gaps"),
        ([0, 0, 10**12, 1], [0, 0, 0, 0], ConfigurationError, "task 2 has no training samples"),
        ([0, 0, 1, 1], [0, 0, 1, 7], ConfigurationError, r"of tasks \[7\], which training lacks"),
        ([0, 0, 1, -1], [0, 0, 1, 1], DataError, "training task ids must be at least 0: found -1"),
        ([0, 0, 1, None], [0, 0, 1, 1], DataError, "training task ids: 1 missing"),
        ([0, 0, 1, 1], [0, 0, 1, float("nan")], DataError, "test task ids.*nan"),
        ([0, 0, 1, 0.5], [0, 0, 1, 1], DataError, "training task ids must be whole numbers.*0.5"),
        (list("aabb"), list("aabb"), DataError, "training task ids are names, such as 'a'"),
        ([0, 0, 1], [0, 0, 1, 1], DataError, "3 task ids and 4 labels"),
    ],
)
def test_task_ids_that_cannot_be(tasks, test_tasks, error, words) -> None:
    x, y = np.zeros((4, 2), dtype=np.float32), [0, 0, 1, 1]
    with pytest.raises(error, match=words):
        ContinualDataModule((x, y, tasks, x, y, test_tasks), scenario="given")


def test_float_images_stay_as_they_are() -> None:
    x = np.random.default_rng(0).random((40, 8, 8, 3), dtype=np.float32)
    data = ContinualDataModule((x, T10, x, T10))
    data.setup()
    batch = data.prepare_batch(next(iter(data.train_dataloader())), train=True, epoch=0)
    assert float(batch.inputs.max()) > 0.9
    assert batch.inputs.shape[1:] == (3, 8, 8)


def test_hold_out_of_small_tasks_has_every_class_on_both_sides() -> None:
    data = images(T10, increment=2, val_ratio=0.1)
    loaders = ContinualDataModule.val_dataloader(_at_last_task(data))
    assert len(loaders) == 5
    for t, loader in enumerate(loaders):
        held, kept = set(loader.indices.tolist()), set(data.train_indices(t).tolist())
        assert not held & kept
        assert set(T10[list(held)]) == set(T10[list(kept)]) == {2 * t, 2 * t + 1}


def test_tasks_whose_classes_have_one_sample_hold_none_out_and_say_so() -> None:
    with pytest.warns(UserWarning, match=r"tasks without hold-outs: \[1\]"):
        data = images([0, 0, 1, 1, 2, 3], increment=2, val_ratio=0.5)
    assert [len(data.train_indices(t)) for t in range(2)] == [2, 2]
    assert [len(loader.indices) for loader in _at_last_task(data).val_dataloader()] == [2, 0]


def _at_last_task(data):
    data.task_id = data.num_tasks - 1
    return data


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.integers(1, 5))
def test_parts_cover_all_and_differ_by_one(labels, num_tasks) -> None:
    parts = scenarios.part_of_samples(np.array(labels), num_tasks)
    sizes = np.bincount(parts, minlength=num_tasks)
    assert sizes.sum() == len(labels)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("name", ["icarl_1993", "icarl_list"])
def test_published_orders_are_permutations(name) -> None:
    order = scenarios.named_class_order(name)
    assert sorted(order) == list(range(100))
    assert order[:5] == {"icarl_1993": [68, 56, 78, 8, 23], "icarl_list": [87, 0, 52, 58, 44]}[name]
