"""Continuum's scenarios by class path and as objects: its own tasksets, sample by sample."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from continuum.datasets import InMemoryDataset
from continuum.scenarios import (
    ClassIncremental,
    ContinualScenario,
    InstanceIncremental,
    Permutations,
    Rotations,
    TransformationIncremental,
)
from continuum.tasks import TaskType
from torchvision import transforms

from dcl_lightning.data import ContinualDataModule
from dcl_lightning.errors import ConfigurationError, DataError

Y = np.repeat(np.arange(5), 4)
T = np.tile([0, 1, 2, 1], 5)
RGB = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def make(dataset, scenario, **kwargs) -> ContinualDataModule:
    data = ContinualDataModule(dataset, scenario=scenario, **({"batch_size": 6, "seed": 0} | kwargs))
    data.setup()
    return data


def path(name: str, **options) -> dict:
    return {"class_path": f"continuum.scenarios.{name}", "init_args": options}


def rows(data, task: int, test: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and original labels of a task's samples as evaluation sees them, in their order."""
    loader = data.test_loaders(task)[task] if test else data.train_eval_loader(data.train_indices(task))
    batches = [data.prepare_batch(batch, train=False, epoch=0) for batch in loader]
    targets = torch.cat([b.targets for b in batches])
    return torch.cat([b.inputs for b in batches]), torch.tensor([data.original_labels[y] for y in targets])


def theirs(scenario, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    taskset = scenario[task]
    return torch.stack([taskset[i][0] for i in range(len(taskset))]), torch.from_numpy(np.asarray(taskset._y))


BLUR = {"class_path": "torchvision.transforms.GaussianBlur", "init_args": {"kernel_size": 3, "sigma": 2.0}}
INVERT = {"class_path": "torchvision.transforms.RandomInvert", "init_args": {"p": 1.0}}


@pytest.mark.parametrize("x", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize(
    ("scenario", "own"),
    [
        (path("Permutations", nb_tasks=3, seed=1), lambda d: Permutations(d, nb_tasks=3, seed=1)),
        (
            path("Permutations", nb_tasks=3, seed=1, shared_label_space=False),
            lambda d: Permutations(d, nb_tasks=3, seed=1, shared_label_space=False),
        ),
        (path("Rotations", list_degrees=[0, 45, 90]), lambda d: Rotations(d, list_degrees=[0, 45, 90])),
        (
            path("TransformationIncremental", incremental_transformations=[[], [BLUR], [INVERT, BLUR]]),
            lambda d: TransformationIncremental(
                d,
                [
                    [],
                    [transforms.GaussianBlur(3, 2.0)],
                    [transforms.RandomInvert(1.0), transforms.GaussianBlur(3, 2.0)],
                ],
            ),
        ),
        (path("InstanceIncremental", nb_tasks=4), lambda d: InstanceIncremental(d, nb_tasks=4)),
        ("continuum.scenarios.ContinualScenario", ContinualScenario),
    ],
)
def test_tasks_are_continuums_own_bit_for_bit(x, scenario, own) -> None:
    order = np.arange(len(Y))[::-1]
    data = make((x, Y, T, x[order], Y[order], T[order]), scenario)
    train, test = own(InMemoryDataset(x, Y, T)), own(InMemoryDataset(x[order], Y[order], T[order], train=False))
    assert data.num_tasks == len(train)
    assert data.num_classes == len(np.unique(np.concatenate([train[t]._y for t in range(len(train))])))
    for t in range(len(train)):
        for one, is_test in ((train, False), (test, True)):
            for got, expected in zip(rows(data, t, is_test), theirs(one, t), strict=True):
                assert torch.equal(got, expected), (t, is_test)
        task = data.tasks([1] * len(train))[t]
        assert set(task.labels) == set(train[t]._y.tolist())
        assert task.num_samples == len(train[t])
        assert not task.leaked


def test_scenario_objects_bring_their_data() -> None:
    pair = [Rotations(InMemoryDataset(RGB, Y, train=train), list_degrees=[0, 30]) for train in (True, False)]
    data = ContinualDataModule(scenario=tuple(pair), batch_size=6)
    data.setup()
    assert (data.num_tasks, data.num_classes, data.input_spec, data.dataset_name) == (2, 5, (3, 8, 8), "arrays")
    for t in range(2):
        assert torch.equal(rows(data, t)[0], theirs(pair[0], t)[0])


def test_names_of_classes_and_gaps_in_labels_stay() -> None:
    names = np.array(["a", "b", "c", "d", "e"])[Y]
    data = make((RGB, names, RGB, names), path("Permutations", nb_tasks=2))
    assert data.tasks([1, 1])[1].labels == ("a", "b", "c", "d", "e")
    gaps = make((RGB, Y * 10 + 3, RGB, Y * 10 + 3), path("Rotations", list_degrees=[0, 90]))
    assert gaps.original_labels == [3, 13, 23, 33, 43]


def test_classes_come_in_the_order_of_their_first_task() -> None:
    tasks = 4 - Y
    data = make((RGB, Y, tasks, RGB, Y, tasks), path("ContinualScenario"))
    assert data.original_labels == [4, 3, 2, 1, 0]
    assert [task.classes for task in data.tasks([1] * 5)] == [(0,), (1,), (2,), (3,), (4,)]


def test_vectors_are_permuted_where_continuum_would_leave_them_in_silence() -> None:
    x = np.random.default_rng(0).random((20, 12), dtype=np.float32)
    data = make((x, Y, x, Y), path("Permutations", nb_tasks=2, seed=3))
    first, second = (rows(data, t)[0].reshape(20, 12) for t in range(2))
    assert torch.equal(first, torch.from_numpy(x))
    assert not torch.equal(second, first)
    assert torch.equal(second.sort(1).values, first.sort(1).values)
    order = [int((first[0] == value).nonzero()) for value in second[0]]
    assert torch.equal(second, first[:, order])


def test_random_rotations_repeat_by_seed_epoch_and_sample_and_leave_the_generator_alone() -> None:
    def batches(seed: int, epoch: int) -> dict[int, torch.Tensor]:
        data = make((RGB, Y, RGB, Y), path("Rotations", list_degrees=[[1, 89], 0]), seed=seed)
        loader = data.train_dataloader()
        loader.epoch = epoch
        before = torch.get_rng_state()
        seen = {int(i): x for b in loader for i, x in zip(b.sample_ids, b.inputs, strict=True)}
        assert torch.equal(torch.get_rng_state(), before)
        return seen

    first, again, later, other = batches(0, 0), batches(0, 0), batches(0, 1), batches(1, 0)
    assert all(torch.equal(first[i], again[i]) for i in first)
    # Two angles that differ by less than a degree or so may give one image of this size.
    assert sum(torch.equal(first[i], later[i]) for i in first) < 6
    assert sum(torch.equal(first[i], other[i]) for i in first) < 6


@pytest.mark.parametrize(
    ("dataset", "scenario", "words"),
    [
        ((RGB, Y, RGB, Y), path("ClassIncremental", increment=2), r"for ClassIncremental give data\.scenario=class"),
        ((RGB, Y, RGB, Y), path("SegmentationClassIncremental"), "segmentation"),
        ((RGB, Y, RGB, Y), path("ContinualScenario"), "task ids, which the training split lacks"),
        ((RGB, Y, T + 1, RGB, Y, T + 1), path("ContinualScenario"), r"\[1, 2, 3\].*from 0"),
        ((RGB, Y, T * 2, RGB, Y, T), path("InstanceIncremental"), r"\[0, 2, 4\].*without gaps"),
        ((RGB, Y, T, RGB, Y, T * 0), path("ContinualScenario"), "3 tasks of training and 1 of test"),
        ((RGB, Y, RGB, Y), path("InstanceIncremental"), "number of tasks"),
        ((RGB, Y, RGB, Y), path("Permutations"), "number of tasks"),
        ((RGB, Y, RGB, Y), path("Permutations", nb_tasks=2, sed=1), "sed"),
        ((RGB, Y, RGB, Y), path("Nothing"), "cannot be imported"),
        ((RGB, Y, RGB, Y), {"class_path": "torch.nn.Linear"}, "Linear is no scenario"),
        ((RGB, Y, RGB, Y), {"class_path": "Permutations"}, "class_path and init_args"),
        ((RGB, Y, RGB, Y), path("Permutations", nb_tasks=2) | {"options": 1}, "class_path and init_args"),
        ((RGB, Y, RGB, Y), (1, 2, 3), "two scenario objects"),
        ((RGB, Y, RGB, Y), InstanceIncremental(InMemoryDataset(RGB, Y), nb_tasks=2), "two scenario objects"),
        ((RGB, Y, RGB, Y), (1, 2), "int is no scenario"),
    ],
)
def test_what_cannot_be_or_would_go_wrong_in_silence_is_refused(dataset, scenario, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make(dataset, scenario)


def test_labels_that_would_mean_different_classes_in_training_and_test_are_refused() -> None:
    some = Y < 4
    scenario = path("Permutations", nb_tasks=2, shared_label_space=False)
    with pytest.raises(DataError, match="5 classes of training and the 4 of test"):
        make((RGB, Y, RGB[some], Y[some]), scenario)
    shared = make((RGB, Y, RGB[some], Y[some]), path("Permutations", nb_tasks=2))
    assert [len(loader.indices) for loader in shared.test_loaders(1)] == [16, 16]
    pair = [Permutations(InMemoryDataset(RGB, Y + 1), nb_tasks=2, shared_label_space=False) for _ in range(2)]
    with pytest.raises(DataError, match="labels reach 5"):
        ContinualDataModule(scenario=tuple(pair))


def test_float_images_that_continuum_would_turn_black_are_refused() -> None:
    pair = [InstanceIncremental(InMemoryDataset(RGB / 255, Y), nb_tasks=2) for _ in range(2)]
    with pytest.raises(DataError, match="not uint8"):
        ContinualDataModule(scenario=tuple(pair))
    floats = make((RGB / 255, Y, RGB / 255, Y), path("InstanceIncremental", nb_tasks=2))
    assert float(rows(floats, 0)[0].max()) > 0.9


@pytest.mark.parametrize("kind", [TaskType.TEXT, TaskType.IMAGE_PATH])
def test_scenario_objects_of_other_data_are_refused(kind) -> None:
    pair = [InstanceIncremental(InMemoryDataset(Y.astype(str), Y, data_type=kind), nb_tasks=2) for _ in range(2)]
    with pytest.raises(ConfigurationError, match=f"type {kind.name}"):
        ContinualDataModule(scenario=tuple(pair))


def test_a_scenario_object_of_classes_is_refused() -> None:
    pair = [ClassIncremental(InMemoryDataset(RGB, Y), increment=1) for _ in range(2)]
    with pytest.raises(ConfigurationError, match=r"data\.scenario=class"):
        ContinualDataModule(scenario=tuple(pair))


def test_a_named_set_keeps_its_normalisation_and_is_not_cropped_after_its_pixels_were_permuted() -> None:
    options = {"size": 8, "per_class": 8}
    data = ContinualDataModule("synthetic", scenario=path("Permutations", nb_tasks=2), source_options=options)
    plain = ContinualDataModule("synthetic", scenario="none", source_options=options)
    data.setup(), plain.setup()
    assert not data.augment
    assert plain.augment
    torch.testing.assert_close(rows(data, 0)[0], rows(plain, 0)[0])
    cut = ContinualDataModule("synthetic", scenario=path("InstanceIncremental", nb_tasks=2), source_options=options)
    assert cut.augment


def test_samples_are_read_in_the_training_thread_only() -> None:
    data = make((RGB, Y, RGB, Y), path("Rotations", list_degrees=[[1, 89], 0]))
    data.attach_replay(
        SimpleNamespace(loads_ahead=True, replayed_per_batch=None, replayed_ids=lambda task: torch.arange(0))
    )
    assert type(data.train_dataloader()).__name__ == "TaskLoader"


def test_tasks_that_the_data_bring_need_no_continuum() -> None:
    data, same = (make((RGB, Y, T, RGB, Y, T), scenario) for scenario in ("given", path("ContinualScenario")))
    assert data.num_tasks == same.num_tasks == 3
    for t in range(3):
        assert data.train_indices(t).tolist() == same.train_indices(t).tolist() == np.flatnonzero(t == T).tolist()
    pair = tuple(InMemoryDataset(RGB, Y, T, train=train) for train in (True, False))
    assert torch.equal(make(pair, "given").stream.train_parts, data.stream.train_parts)
    with pytest.raises(ConfigurationError, match="'digits' brings no tasks"):
        ContinualDataModule("digits", scenario="given")
    with pytest.raises(ConfigurationError, match=r"test samples are of tasks \[3\]"):
        make((RGB, Y, T, RGB, Y, T + 1), "given")
