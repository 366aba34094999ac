"""PyTorch data sets as a source."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from dcl_lightning import ER, ContinualDataModule
from dcl_lightning.backbones import MLP
from dcl_lightning.data.sources.dataset import DatasetInputs, read_split
from dcl_lightning.errors import ConfigurationError, DataError
from tests.conformance.small_stream import make_trainer


class Pictures(Dataset):
    """Grey pictures whose pixels are the row, with labels 0, 1, 2, 0, ..."""

    def __init__(self, count: int, jitter=None, lists: bool = True, target_transform=None) -> None:
        self.count, self.jitter, self.target_transform = count, jitter, target_transform
        if lists:
            self.targets = [row % 3 for row in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int):
        image = Image.fromarray(np.full((4, 5), row, dtype=np.uint8))
        label = row % 3 if self.target_transform is None else self.target_transform(row % 3)
        return (image if self.jitter is None else self.jitter(image)), label


@pytest.mark.parametrize("lists", [True, False])
def test_samples_and_labels_are_those_of_the_data_set(lists: bool) -> None:
    data = ContinualDataModule((Pictures(30, lists=lists), Pictures(9, lists=lists)), increment=1, batch_size=4)
    assert (data.num_classes, tuple(data.input_spec), data.num_tasks) == (3, (1, 4, 5), 3)
    data.setup()
    for task in range(3):
        for batch in data.test_loaders(2)[task]:
            assert torch.equal(batch.inputs, batch.sample_ids.view(-1, 1, 1, 1).expand(-1, 1, 4, 5) / 255)
            assert batch.targets.tolist() == [task] * len(batch.targets)
            assert (batch.sample_ids % 3 == task).all()


def test_labels_of_parts_and_with_a_transform() -> None:
    whole = Pictures(12)
    for dataset, expected in (
        (Subset(whole, [5, 0, 1]), [2, 0, 1]),
        (ConcatDataset([Subset(whole, [2]), whole]), [2, *(row % 3 for row in range(12))]),
        (Pictures(6, target_transform=lambda label: 2 - label), [2, 1, 0] * 2),
    ):
        inputs, labels = read_split(dataset, "training")
        assert list(labels) == expected
        assert len(inputs) == len(expected)


def test_tensors_are_taken_as_arrays() -> None:
    x, y = torch.rand(12, 3, 4, 4), torch.arange(12) % 4
    data = ContinualDataModule((TensorDataset(x, y), TensorDataset(x[:4], y[:4])))
    data.setup()
    assert torch.equal(data.train_inputs, x)


def test_random_transforms_repeat_and_leave_the_generators_alone() -> None:
    def jitter(image: Image.Image) -> torch.Tensor:
        return torch.full((1, 2, 2), float(torch.rand(())) + random.random() + float(np.random.rand()))

    def epoch(number: int) -> list[float]:
        data = ContinualDataModule((Pictures(30, jitter), Pictures(9, jitter)), increment=3, batch_size=7, seed=1)
        data.setup()
        loader = data.train_dataloader()
        loader.epoch = number
        return [float(x.mean()) for batch in loader for x in batch.inputs]

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = epoch(0), epoch(0), epoch(1)
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == 30
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_fit_learns_from_them(tmp_path: Path) -> None:
    def light(image: Image.Image) -> np.ndarray:
        return np.full((4, 4, 1), 80 * (image.getpixel((0, 0)) % 3), dtype=np.uint8)

    data = ContinualDataModule((Pictures(60, light), Pictures(12, light)), increment=3, batch_size=6)
    agent = ER(MLP([8]), epochs_per_task=20)
    make_trainer(tmp_path).fit(agent, datamodule=data)
    assert float(agent.results.matrix.average_accuracy) > 0.9


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Stream(), "is iterable"),
        (TensorDataset(torch.rand(4, 2)), "sample 0 of the training data set is tuple: give pairs"),
        (Pictures(4, jitter=lambda image: "text"), "give pairs"),
    ],
)
def test_what_is_no_pair_is_refused(dataset: Dataset, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ContinualDataModule((dataset, Pictures(4)))


def test_images_of_several_sizes_are_refused_where_they_are_read() -> None:
    def grow(image: Image.Image) -> torch.Tensor:
        return torch.zeros(1, 2, 2 + image.getpixel((0, 0)))

    inputs = DatasetInputs(Pictures(3, grow), "training")
    with pytest.raises(DataError, match=r"sample 1 .* shape \(1, 2, 3\) and the first \(1, 2, 2\)"):
        inputs._sample(1, 0)


def test_indices_of_them_are_no_rows_of_a_memory(tmp_path: Path) -> None:
    data = ContinualDataModule((Pictures(30), Pictures(9)), increment=1, batch_size=4)
    agent = ER(MLP([8]), rehearsal={"buffer_size": 6, "row_format": "index"})
    with pytest.raises(ConfigurationError, match="row_format=inputs"):
        make_trainer(tmp_path).fit(agent, datamodule=data)
