"""PyTorch data sets as a source: samples are read as they are wanted, with the transforms of the data set's own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from dcl_lightning.data.transforms import TransformedInputs, to_float
from dcl_lightning.errors import DataError

__all__ = ["DatasetInputs", "read_split"]


def read_split(dataset: Dataset[Any], name: str) -> tuple[Tensor | DatasetInputs, object]:
    """Return the inputs and labels of a data set of pairs (input, label).

    Args:
        dataset: map-style.
        name: of the split, for messages.

    Raises:
        DataError: an iterable data set, or one whose samples are no such pairs.
    """
    if isinstance(dataset, IterableDataset):
        raise DataError(f"data.dataset: the {name} data set is iterable: give one with __len__ and __getitem__")
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors
    return DatasetInputs(dataset, name), np.asarray(_labels(dataset))


def _labels(dataset: Any) -> np.ndarray:
    """Return all labels: as the data set lists them, if it has no transform of them, else from each sample."""
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_labels(part) for part in dataset.datasets])
    known = vars(dataset)
    listed = next((known[key] for key in ("targets", "labels") if known.get(key) is not None), None)
    if listed is None or len(listed) != len(dataset) or known.get("target_transform") is not None:
        with _own_generators():
            listed = [dataset[row][1] for row in range(len(dataset))]
    return np.asarray(listed)


class DatasetInputs(TransformedInputs):
    """The samples of a PyTorch data set, in place of a tensor ``(n, C, H, W)`` float32.

    Random transforms draw from the generators of torch, NumPy and Python. These are seeded for each sample by its id,
    in training also by seed and epoch, so that the draws repeat, and restored afterwards.

    Args:
        dataset: map-style, of pairs: a tensor, a Pillow image or an array, whose uint8 values are divided by 255; and a
            label.
        name: of the split, for messages.

    Raises:
        DataError: the first sample is no such pair.
    """

    def __init__(self, dataset: Dataset[Any], name: str) -> None:
        self.dataset, self.name = dataset, name
        count = len(cast(Sized, dataset))
        self.shape = (count, *(self._read(0, 0).shape if count else (1, 1, 1)))

    def __len__(self) -> int:
        return int(self.shape[0])

    def _sample(self, row: int, seed: int) -> Tensor:
        values = self._read(row, seed)
        if values.shape != self.shape[1:]:
            raise DataError(
                f"data.dataset: sample {row} of the {self.name} data set has shape {tuple(values.shape)} and the first "
                f"{tuple(self.shape[1:])}: give images of one size, as by a transform"
            )
        return values

    def _read(self, row: int, seed: int) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        with _own_generators(seed):
            pair = self.dataset[row]
        sample = pair[0] if isinstance(pair, (tuple, list)) and len(pair) == 2 else pair
        if hasattr(sample, "getbands"):  # a Pillow image
            sample = pil_to_tensor(sample)
        elif isinstance(sample, np.ndarray):
            sample = torch.from_numpy(sample if sample.ndim < 3 else sample.transpose(2, 0, 1))
        if sample is pair or not isinstance(sample, Tensor) or not 1 <= sample.ndim <= 3:
            raise DataError(
                f"data.dataset: sample {row} of the {self.name} data set is {type(pair).__name__}: give pairs of an "
                "input (tensor (C, H, W), Pillow image or array (H, W, C)) and a label"
            )
        values = to_float(sample)
        return values.view(*[1] * (3 - values.ndim), *values.shape)


@contextmanager
def _own_generators(seed: int = 0) -> Iterator[None]:
    """Seed the generators of torch, NumPy and Python on the host; restore them at the end."""
    others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # ``torch.manual_seed`` would also seed the devices
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])
