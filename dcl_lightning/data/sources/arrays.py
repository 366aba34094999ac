"""What a reader of data sets returns, and what is known about a data set before it is read."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dcl_lightning.data.loader import Inputs
from dcl_lightning.data.scenarios import check_labels
from dcl_lightning.data.sources.continuum import read_continuum
from dcl_lightning.errors import DataError
from dcl_lightning.types import InputSpec

__all__ = ["Reader", "Source", "Splits", "from_arrays"]


class Splits(NamedTuple):
    """Inputs ``(n, C, H, W)`` uint8 or float32 of both splits, or what stands for them, and labels ``(n,)``.

    Labels are int64 or str. Where the data bring them, also the task of each sample, ``(n,)`` int64.
    """

    train_inputs: Inputs
    train_labels: np.ndarray
    test_inputs: Inputs
    test_labels: np.ndarray
    train_tasks: np.ndarray | None = None
    test_tasks: np.ndarray | None = None


_WANTED = (
    "give the name of a data set, (x_train, y_train, x_test, y_test), the same with task ids as third of each split, "
    "or two continuum data sets"
)

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

    def check_count(self, name: str, root: str, found: int, expected: int) -> None:
        """Refuse files with another number of classes.

        Args:
            name: name of the data set.
            root: folder of the data sets.
            found: classes that were found.
            expected: classes that were announced.

        Raises:
            DataError: these differ.
        """
        if found == expected:
            return
        part = f"set data.source_options.num_classes={found} to use a part of it"
        raise DataError(
            f"data set '{name}' in {os.path.abspath(self.path(root))} has training samples of {found} classes, "
            f"expected {expected}: {part if 'num_classes' in self.options else 'fetch it anew'}"
        )


def from_arrays(splits: tuple[Any, ...], where: str = "") -> Splits:
    """Return splits from ``(x_train, y_train, x_test, y_test)`` or a pair of continuum data sets.

    A third array of a split, as in ``(x_train, y_train, t_train, ...)``, is the task of each sample, or None.
    Images are ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` with 1 or 3 channels, vectors ``(n, D)``;
    uint8 stays uint8, and is divided by 255 on the device; anything else becomes float32 and is used as it is.

    Args:
        splits: arrays, or tensors, or two data sets.
        where: where they come from, with which messages begin.

    Raises:
        DataError: arrays that do not fit each other, or labels, values or shapes that cannot be used.
    """
    if not isinstance(splits, (tuple, list)):
        raise DataError(f"data.dataset: {_WANTED}, not {type(splits).__name__}")
    if len(splits) == 2 and all(hasattr(split, "get_data") for split in splits):
        splits = tuple(array for split in splits for array in read_continuum(split, type(split).__name__))
    if len(splits) == 4:
        splits = (*splits[:2], None, *splits[2:], None)
    if len(splits) != 6:
        raise DataError(f"data.dataset: {_WANTED}, not {len(splits)}")
    x_train, y_train, t_train, x_test, y_test, t_test = splits
    labels = check_labels(y_train, f"{where}training labels"), check_labels(y_test, f"{where}test labels")
    inputs = _to_inputs(x_train, f"{where}training inputs"), _to_inputs(x_test, f"{where}test inputs")
    for part, x, y in zip(("training", "test"), inputs, labels, strict=True):
        if len(x) != len(y):
            raise DataError(f"{where}the {part} split has {len(x)} inputs and {len(y)} labels")
    if not len(labels[0]):
        raise DataError(f"{where}the training split is empty")
    if len(labels[1]) and inputs[0].shape[1:] != inputs[1].shape[1:]:
        shapes = " and ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise DataError(f"{where}training and test inputs differ in shape (channels, height, width): {shapes}")
    if len(labels[1]) and inputs[0].dtype != inputs[1].dtype:
        raise DataError(
            f"{where}of training and test inputs one is uint8, which is divided by 255, and the other is not: give "
            "both in one type"
        )
    tasks = [
        None if t is None else check_labels(t, f"{where}{part} task ids")
        for part, t in (("training", t_train), ("test", t_test))
    ]
    for part, t, y in zip(("training", "test"), tasks, labels, strict=True):
        if t is not None and t.dtype.kind == "U":
            raise DataError(
                f"{where}task ids of the {part} split are names, such as {t[0].item()!r}: number tasks from 0"
            )
        if t is not None and len(t) != len(y):
            raise DataError(f"{where}the {part} split has {len(t)} task ids and {len(y)} labels")
    return Splits(inputs[0], labels[0], inputs[1], labels[1], *tasks)


def _to_inputs(values: Any, field: str) -> Tensor:
    """Return float32 or uint8, channels first."""
    tensor = _to_tensor(values, field)
    given = tensor.dtype
    if given != torch.uint8:
        tensor = tensor.to(torch.float32)
        # What is mapped need not fit into memory, so it is not looked through; a cache's was when it was written.
        if not isinstance(values, np.memmap) and tensor.numel():
            _check_values(tensor, given, field)
    return _to_channels_first(tensor, field)


def _to_tensor(values: Any, field: str) -> Tensor:
    """Return real numbers on the CPU, which share the memory of what was given where they can."""
    if isinstance(values, Tensor):
        if values.is_complex() or values.is_quantized or values.layout != torch.strided:
            kind = values.dtype if values.layout == torch.strided else values.layout
            raise DataError(f"{field} of type {kind}: give real numbers in a dense tensor")
        return values.detach().cpu()
    if isinstance(values, np.ma.MaskedArray) and np.ma.getmaskarray(values).any():
        row = int(np.argwhere(np.ma.getmaskarray(values))[0][0])
        raise DataError(f"{field}: row {row} has masked values: fill them, or leave such samples out")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{field} cannot be read as one array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{field} of type {array.dtype}: give real numbers")
    # torch knows neither another byte order nor long doubles.
    array = np.ascontiguousarray(array, "f8" if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not writable")  # nothing is ever written
        return torch.from_numpy(array)


def _check_values(tensor: Tensor, given: torch.dtype, field: str) -> None:
    """Refuse values that are not finite; warn of images that would have been scaled had they been uint8.

    Args:
        tensor: float32, not empty.
        given: type of what was given.
        field: how messages call it.

    Raises:
        DataError: the row of the first value that is not finite.
    """
    low, high = (float(end) for end in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        row = next(i for i, sample in enumerate(tensor) if not bool(torch.isfinite(sample).all()))
        raise DataError(f"{field}: row {row} has values that are not finite (NaN, or too large for float32)")
    least = 127 if given.is_floating_point else 1
    if tensor.ndim > 2 and low >= 0 and high > least:
        name = str(given).removeprefix("torch.")
        rank_zero_warn(
            f"{field} are {name} from {low:g} to {high:g} and are used as they are: images of 0 to 255 are divided by "
            "255 as uint8 alone; give these, or divide them yourself"
        )


def _to_channels_first(tensor: Tensor, field: str) -> Tensor:
    if tensor.ndim == 2:
        return tensor[:, None, None, :]
    if tensor.ndim == 3:
        return tensor[:, None]
    if tensor.ndim != 4:
        raise DataError(f"{field} of shape {tuple(tensor.shape)}: give (n, D), (n, H, W), (n, H, W, C) or (n, C, H, W)")
    if tensor.shape[1] not in (1, 3):
        last = tensor.shape[3]
        if last in (1, 3):
            tensor = tensor.permute(0, 3, 1, 2)
        elif last < min(tensor.shape[1:3]):
            raise DataError(
                f"{field} of shape {tuple(tensor.shape)} look like images of {last} channels: give 1 or 3 (drop an "
                "alpha channel), or other numbers of channels as (n, C, H, W)"
            )
    return tensor.contiguous()
