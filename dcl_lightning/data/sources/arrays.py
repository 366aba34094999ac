"""Both splits of a data set in memory: arrays, tensors or continuum data sets are checked and made uniform."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from dcl_lightning.data.decode import read_image
from dcl_lightning.data.loader import Inputs
from dcl_lightning.data.sources.dataset import DatasetInputs, read_split
from dcl_lightning.errors import DataError

__all__ = ["Splits", "check_labels", "from_arrays", "read_dataset"]


class Splits(NamedTuple):
    """Both splits of a data set.

    Inputs are ``(n, C, H, W)`` uint8 or float32, or stand for such a tensor; labels ``(n,)`` are int64 or str. Data
    sets with tasks of their own also have the task ``(n,)`` int64 of each sample.
    """

    train_inputs: Inputs
    train_labels: np.ndarray
    test_inputs: Inputs
    test_labels: np.ndarray
    train_tasks: np.ndarray | None = None
    test_tasks: np.ndarray | None = None


_WANTED = (
    "give the name of a data set, (x_train, y_train, x_test, y_test), the same with task ids as third of each split, "
    "or two data sets, PyTorch's or continuum's, of training and of test"
)


def from_arrays(splits: object, where: str = "") -> Splits:
    """Return splits from ``(x_train, y_train, x_test, y_test)`` or a pair of data sets, PyTorch's or continuum's.

    An optional third array of each split, as in ``(x_train, y_train, t_train, ...)``, is the task of each sample.
    Images are ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` with 1 or 3 channels, vectors ``(n, D)``. uint8 stays
    uint8 and is divided by 255 on the device; all other types become float32 with their values unchanged.
    Messages begin with ``where``.

    Raises:
        DataError: arrays that do not fit together, or labels, values or shapes that cannot be used.
    """
    if not isinstance(splits, (tuple, list)):
        raise DataError(f"data.dataset: {_WANTED}, not {type(splits).__name__}")
    if len(splits) == 2 and all(hasattr(split, "get_data") for split in splits):
        splits = [array for split in splits for array in read_dataset(split, type(split).__name__)]
    if len(splits) == 2 and all(isinstance(split, Dataset) for split in splits):
        splits = [*read_split(splits[0], "training"), *read_split(splits[1], "test")]
    if len(splits) == 4:
        splits = (*splits[:2], None, *splits[2:], None)
    if len(splits) != 6:
        raise DataError(f"data.dataset: {_WANTED}, not {len(splits)}")
    x, y, t, x_test, y_test, t_test = splits
    x, y, t = _split(x, y, t, f"{where}training")
    x_test, y_test, t_test = _split(x_test, y_test, t_test, f"{where}test")
    if not len(y):
        raise DataError(f"{where}the training split is empty")
    if len(y_test) and x.shape[1:] != x_test.shape[1:]:
        shapes = f"{tuple(x.shape[1:])} and {tuple(x_test.shape[1:])}"
        raise DataError(f"{where}training and test inputs differ in shape (channels, height, width): {shapes}")
    if len(y_test) and x.dtype != x_test.dtype:
        raise DataError(
            f"{where}of training and test inputs one is uint8, which is divided by 255, and the other is not: give "
            "both in one type"
        )
    return Splits(x, y, x_test, y_test, t, t_test)


def _split(inputs: object, labels: object, tasks: object, name: str) -> tuple[Inputs, np.ndarray, np.ndarray | None]:
    y = check_labels(labels, f"{name} labels")
    x = inputs if isinstance(inputs, DatasetInputs) else _to_inputs(inputs, f"{name} inputs")
    if len(x) != len(y):
        raise DataError(f"{name} split: {len(x)} inputs and {len(y)} labels")
    if tasks is None:
        return x, y, None
    t = check_labels(tasks, f"{name} task ids")
    if t.dtype.kind == "U":
        raise DataError(f"{name} task ids are names, such as {t[0].item()!r}: number tasks from 0")
    if len(t) != len(y):
        raise DataError(f"{name} split: {len(t)} task ids and {len(y)} labels")
    return x, y, t


# -- data sets of continuum's kind ---------------------------------------------------------------------------------


def read_dataset(split: Any, name: str) -> tuple[Any, Any, Any]:
    """Return inputs, labels, and task ids or None, of one split of a continuum data set; read images given by path.

    Raises:
        DataError: the data cannot be read.
    """
    try:
        x, y, t = split.get_data()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data set '{name}' cannot be read: continuum keeps names of files in ASCII, found {str(error.object)!r}; "
            "use data.dataset=folder, or names without accents"
        ) from error
    except Exception as error:
        raise DataError(f"data set '{name}' cannot be read: {error}") from error
    if isinstance(x, np.ndarray) and x.dtype.kind in "OUS":
        return _read_images([os.fsdecode(path) for path in x]), y, t
    return x, y, t


def _read_images(paths: list[str]) -> np.ndarray:
    images: list[np.ndarray] = []
    for path in paths:
        images.append(read_image(path).permute(1, 2, 0).numpy())
        if images[-1].shape != images[0].shape:
            sizes = " and ".join(f"{h}x{w}" for h, w, _ in (images[0].shape, images[-1].shape))
            raise DataError(f"images differ in size, {sizes} ({path}): resize them to one size first")
    return np.stack(images)


# -- inputs --------------------------------------------------------------------------------------------------------


def _to_inputs(values: object, field: str) -> Tensor:
    tensor = _to_tensor(values, field)
    given = tensor.dtype
    if given != torch.uint8:
        tensor = tensor.to(torch.float32)
        # A mapped array may exceed the memory, so its values are not read; a cache's were when it was written.
        if not isinstance(values, np.memmap) and tensor.numel():
            _check_values(tensor, given, field)
    return _to_channels_first(tensor, field)


def _to_tensor(values: object, field: str) -> Tensor:
    """Return real numbers on the CPU that share the memory of ``values`` where possible."""
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
    # torch has neither foreign byte orders nor long doubles.
    array = np.ascontiguousarray(array, "f8" if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not writable")  # nothing writes to it
        return torch.from_numpy(array)


def _check_values(tensor: Tensor, given: torch.dtype, field: str) -> None:
    """Refuse values that are not finite; warn of images in 0..255 that will not be divided by 255."""
    low, high = (float(end) for end in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        row = next(i for i, sample in enumerate(tensor) if not bool(torch.isfinite(sample).all()))
        raise DataError(f"{field}: row {row} has values that are not finite (NaN, or too large for float32)")
    least = 127 if given.is_floating_point else 1
    if tensor.ndim > 2 and low >= 0 and high > least:
        name = str(given).removeprefix("torch.")
        rank_zero_warn(
            f"{field} are {name} from {low:g} to {high:g} and are used as they are: only uint8 images are divided by "
            "255; give uint8, or divide them yourself"
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


# -- labels --------------------------------------------------------------------------------------------------------


def check_labels(labels: object, field: str = "labels") -> np.ndarray:
    """Return labels, one for each sample, as ``(n,)`` int64 or str; bytes are decoded as UTF-8.

    Raises:
        DataError: labels that are missing, negative, fractional, one-hot or of another type, numbers among names, or
            names that differ only in spaces at their ends.
    """
    array = _to_array(labels, field)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{field} of shape {array.shape}: give one label a sample, shape (n,), not one-hot rows")
    if array.dtype.kind in "OST":
        array = _of_one_kind(array.tolist(), field)
    if array.dtype.kind == "U":
        _check_names(np.unique(array).tolist(), field)
        return array
    if array.dtype.kind == "f":
        wrong = array[~np.isfinite(array) | (array != np.floor(array))]
        if len(wrong):
            raise DataError(f"{field} must be whole numbers or names: found {_some(wrong)}")
    elif array.dtype.kind not in "iub":
        raise DataError(f"{field} of type {array.dtype}: give whole numbers or names")
    if array.dtype.kind in "uf" and (array.astype(float) >= 2.0**63).any():
        raise DataError(f"{field} must be below 2**63: found {_some(array[array.astype(float) >= 2.0**63])}")
    if len(array) and array.min() < 0:
        raise DataError(f"{field} must be at least 0: found {_some(array[array < 0])}")
    return array.astype(np.int64)


def _to_array(labels: object, field: str) -> np.ndarray:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        # NumPy has no bfloat16.
        labels = (labels.float() if labels.is_floating_point() else labels).numpy()
    if isinstance(labels, np.ma.MaskedArray) and np.ma.getmaskarray(labels).any():
        raise _missing(field, np.flatnonzero(np.ma.getmaskarray(labels)), "masked")
    # Among names NumPy would make text of everything: "nan" of a missing label, "1" of a number.
    names = isinstance(labels, (list, tuple)) and any(isinstance(label, (str, bytes)) for label in labels)
    try:
        return np.asarray(labels, dtype=object if names else None)
    except (ValueError, TypeError) as error:
        raise DataError(f"{field} cannot be read as one label a sample: {error}") from error


def _of_one_kind(values: list[Any], field: str) -> np.ndarray:
    """Return the labels of an object array as an array of names or of numbers, which must not be sorted as text."""
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise _missing(field, missing, repr(values[missing[0]]))
    names = [isinstance(value, (str, bytes)) for value in values]
    if not any(names):
        array = np.array(values)
        if array.dtype.kind in "iufb":
            return array
        raise DataError(f"{field} such as {values[0]!r}: give whole numbers, below 2**63, or names")
    if not all(names):
        raise DataError(
            f"{field} are names and numbers, such as {values[names.index(True)]!r} and "
            f"{values[names.index(False)]!r}: give either"
        )
    try:
        return np.array([value.decode() if isinstance(value, bytes) else value for value in values], dtype=str)
    except UnicodeDecodeError as error:
        raise DataError(f"{field} such as {error.object!r} are not UTF-8: give text") from error


def _is_missing(value: object) -> bool:
    nan = isinstance(value, (float, np.floating)) and np.isnan(value)
    return value is None or bool(nan) or type(value).__name__ in ("NAType", "NaTType")  # of pandas


def _missing(field: str, rows: Sequence[int] | np.ndarray, what: str) -> DataError:
    return DataError(
        f"{field}: {len(rows)} missing, the first in row {int(rows[0])} ({what}): leave such samples out, or give "
        "them a class"
    )


def _check_names(names: list[str], field: str) -> None:
    """Refuse empty names and names that look the same; warn of names that usually mean a missing label."""
    stripped: dict[str, str] = {}
    for name in names:
        word = name.strip()
        if not word:
            raise DataError(f"{field}: some are empty ({name!r}): leave such samples out, or give them a class")
        if word != word.encode("utf-8", "replace").decode():
            raise DataError(f"{field}: {name!r} cannot be written as UTF-8, as reports are: give it another name")
        other = stripped.setdefault(word, name)
        if other != name:
            raise DataError(f"{field} {other!r} and {name!r} differ in spaces alone: give one class one name")
    for word in ("nan", "NaN", "<NA>", "None", "NaT"):
        if word in stripped:
            rank_zero_warn(f"{field}: a class is called {word!r}; if these are missing labels, leave such samples out")


def _some(values: np.ndarray) -> str:
    distinct = np.unique(values)
    return ", ".join(str(v) for v in distinct[:5].tolist()) + (", ..." if len(distinct) > 5 else "")
