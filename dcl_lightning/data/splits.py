"""What a reader of data sets returns, and what is known of one before it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.continuum_sets import read_continuum
from dcl_lightning.data.images import ImageFiles
from dcl_lightning.data.scenarios import check_labels
from dcl_lightning.errors import DataError
from dcl_lightning.types import InputSpec

__all__ = ["Reader", "Source", "Splits", "from_arrays"]


class Splits(NamedTuple):
    """Inputs ``(n, C, H, W)`` uint8 or float32, or images in files, and labels ``(n,)`` int64 or str of both splits."""

    train_inputs: Tensor | ImageFiles
    train_labels: np.ndarray
    test_inputs: Tensor | ImageFiles
    test_labels: np.ndarray


# Arguments: folder of the data set, whether it may be fetched, options.
Reader = Callable[[str, bool, Mapping[str, int]], Splits]


@dataclass(frozen=True)
class Source:
    """What is known of a data set before any file is read.

    Args:
        num_classes: number of classes; None if the data have to be looked at.
        input_spec: shape of one input.
        read: reads both splits; arguments ``path(root)``, ``download`` and ``options``.
        mean: channel means of inputs in [0, 1].
        std: channel deviations.
        augment: whether training crops and mirrors.
        pad: pixels added on each side before the crop on the device; 0 to mirror only, where readers crop.
        folder: sub-folder of the root.
        files: what must be there, relative to the folder; ``a|b`` if one of two is enough.
        layout: the same in words, for messages; ``files`` if empty.
        downloadable: whether the reader can fetch it.
        options: ``data.source_options`` that it takes.
        cached: whether reading writes a cache, which then one process of a host does before the others.
    """

    num_classes: int | None
    input_spec: InputSpec
    read: Reader
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: bool = False
    pad: int = 4
    folder: str = ""
    files: tuple[str, ...] = ()
    layout: str = ""
    downloadable: bool = False
    options: tuple[str, ...] = ()
    cached: bool = False

    def path(self, root: str) -> str:
        """Return the folder of the data set.

        Args:
            root: folder of the data sets.
        """
        return os.path.join(root, self.folder) if self.folder else root


def from_arrays(splits: tuple[Any, ...]) -> Splits:
    """Return splits from ``(x_train, y_train, x_test, y_test)`` or a pair of continuum data sets.

    Images are ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` with 1 or 3 channels, vectors ``(n, D)``;
    uint8 stays uint8, anything else becomes float32.

    Raises:
        DataError: arrays that do not fit each other, or labels or shapes that cannot be used.
    """
    if len(splits) == 2 and all(hasattr(split, "get_data") for split in splits):
        splits = tuple(array for split in splits for array in read_continuum(split, type(split).__name__))
    if len(splits) != 4:
        raise DataError(
            f"data.dataset: give (x_train, y_train, x_test, y_test) or two continuum data sets, not {len(splits)}"
        )
    x_train, y_train, x_test, y_test = splits
    labels = check_labels(y_train, "training labels"), check_labels(y_test, "test labels")
    inputs = _to_channels_first(x_train), _to_channels_first(x_test)
    for part, x, y in zip(("training", "test"), inputs, labels, strict=True):
        if len(x) != len(y):
            raise DataError(f"the {part} split has {len(x)} inputs and {len(y)} labels")
    if not len(labels[0]):
        raise DataError("the training split is empty")
    if len(labels[1]) and inputs[0].shape[1:] != inputs[1].shape[1:]:
        shapes = " and ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise DataError(f"training and test inputs differ in shape (channels, height, width): {shapes}")
    return Splits(inputs[0], labels[0], inputs[1], labels[1])


def _to_channels_first(values: Any) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if tensor.dtype != torch.uint8:
        tensor = tensor.to(torch.float32)
    if tensor.ndim == 2:
        return tensor[:, None, None, :]
    if tensor.ndim == 3:
        return tensor[:, None]
    if tensor.ndim != 4:
        raise DataError(f"inputs of shape {tuple(tensor.shape)}: give (n, D), (n, H, W), (n, H, W, C) or (n, C, H, W)")
    if tensor.shape[3] == 4 != tensor.shape[2]:
        raise DataError(f"images of shape {tuple(tensor.shape)} have 4 channels: drop the alpha channel, give 1 or 3")
    if tensor.shape[1] not in (1, 3) and tensor.shape[3] in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor.contiguous()
