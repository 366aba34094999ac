"""Where samples come from: one table of named data sets, continuum's classes by path, plain arrays."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcl_lightning.data.cifar import FILES as CIFAR_FILES
from dcl_lightning.data.cifar import read_cifar
from dcl_lightning.data.scenarios import check_labels
from dcl_lightning.errors import ConfigurationError, DataError, DatasetNotFoundError
from dcl_lightning.types import InputSpec

__all__ = ["SOURCES", "Source", "Splits", "check_files", "check_options", "from_arrays", "load"]


class Splits(NamedTuple):
    """Inputs ``(n, C, H, W)`` uint8 or float32 and labels ``(n,)`` int64 or str of both splits."""

    train_inputs: Tensor
    train_labels: np.ndarray
    test_inputs: Tensor
    test_labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """What is known of a data set before any file is read.

    Args:
        num_classes: number of classes.
        input_spec: shape of one input.
        read: reads both splits; arguments ``root``, ``download`` and ``options``.
        mean: channel means of inputs in [0, 1].
        std: channel deviations.
        augment: whether training crops and mirrors.
        folder: sub-folder of the root.
        files: files that must be there, relative to the folder.
        downloadable: whether the reader can fetch it.
    """

    num_classes: int
    input_spec: InputSpec
    read: Callable[[str, bool, Mapping[str, int]], Splits]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: bool = False
    folder: str = ""
    files: tuple[str, ...] = ()
    downloadable: bool = False


_SYNTHETIC = {"num_classes": 10, "size": 32, "per_class": 40, "seed": 0}


def check_options(name: str, options: Mapping[str, int]) -> None:
    """Refuse options that a data set does not take.

    Raises:
        ConfigurationError: an unknown option, or a value below 1 (0 for ``seed``).
    """
    known = sorted(_SYNTHETIC) if name == "synthetic" else []
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigurationError(f"data.source_options: unknown {unknown}; '{name}' takes {known or 'none'}")
    for key, value in options.items():
        least = 0 if key == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"data.source_options: {key}={value!r}; give a whole number of at least {least}")


def load(name: str, root: str, download: bool, options: Mapping[str, int] | None = None) -> Splits:
    """Read both splits of a named data set or of a continuum class.

    Args:
        name: a key of ``SOURCES`` or the class path of a continuum data set.
        root: folder of the data sets.
        download: whether a missing data set may be fetched.
        options: ``num_classes``, ``size``, ``per_class``, ``seed`` of ``synthetic``.

    Raises:
        DatasetNotFoundError: the files are not there and may not be fetched; nothing is created.
        ConfigurationError: an unknown name.
    """
    if name in SOURCES:
        check_files(name, root, download)
        return SOURCES[name].read(root, download, options or {})
    return _from_class_path(name, root, download)


def check_files(name: str, root: str, download: bool) -> None:
    """Refuse a named data set whose files are missing, before anything touches the disk."""
    source = SOURCES[name]
    folder = os.path.join(root, source.folder) if source.folder else root
    here = all(os.path.exists(os.path.join(folder, file)) for file in source.files)
    if not here and not (download and source.downloadable):
        raise DatasetNotFoundError(name, os.path.abspath(folder), ", ".join(source.files), source.downloadable)


def from_arrays(splits: tuple[Any, ...]) -> Splits:
    """Return splits from ``(x_train, y_train, x_test, y_test)`` or a pair of continuum data sets.

    Images are ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` with 1 or 3 channels, vectors ``(n, D)``;
    uint8 stays uint8, anything else becomes float32.

    Raises:
        DataError: arrays that do not fit each other, or labels or shapes that cannot be used.
    """
    if len(splits) == 2 and all(hasattr(split, "get_data") for split in splits):
        splits = tuple(array for split in splits for array in _read_continuum(split, type(split).__name__))
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


def _digits(root: str, download: bool, options: Mapping[str, int]) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)
    parts = train_test_split(x, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    return from_arrays((parts[0], parts[2], parts[1], parts[3]))


def _digits_dev(root: str, download: bool, options: Mapping[str, int]) -> Splits:
    from sklearn.model_selection import train_test_split

    full = _digits(root, download, options)
    x, y = full.train_inputs[:, 0].numpy(), full.train_labels
    parts = train_test_split(x, y, test_size=0.2, stratify=y, random_state=1)
    return from_arrays((parts[0], parts[2], parts[1], parts[3]))


def _synthetic(root: str, download: bool, options: Mapping[str, int]) -> Splits:
    o = _SYNTHETIC | dict(options)
    rng = np.random.default_rng(o["seed"])
    centres = rng.uniform(64, 192, (o["num_classes"], 3, o["size"], o["size"]))

    def draw(per_class: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.repeat(np.arange(o["num_classes"]), per_class)
        x = centres[y] + rng.normal(0, 40, (len(y), *centres.shape[1:]))
        return x.clip(0, 255).astype(np.uint8), y

    (x, y), (x_test, y_test) = draw(o["per_class"]), draw(max(o["per_class"] // 4, 1))
    return from_arrays((x, y, x_test, y_test))


def _continuum(class_name: str, folder: str) -> Callable[[str, bool, Mapping[str, int]], Splits]:
    def read(root: str, download: bool, options: Mapping[str, int]) -> Splits:
        path = os.path.join(root, folder) if folder else root
        return _from_class_path(f"continuum.datasets.{class_name}", path, download)

    return read


def _cifar(num_classes: int, folder: str) -> Callable[[str, bool, Mapping[str, int]], Splits]:
    def read(root: str, download: bool, options: Mapping[str, int]) -> Splits:
        path = os.path.join(root, folder)
        if download:
            import torchvision.datasets

            # Checks what is there and fetches what is not, with checksums.
            getattr(torchvision.datasets, f"CIFAR{num_classes}")(path, download=True)
        return from_arrays(read_cifar(path, num_classes))

    return read


def _from_class_path(name: str, root: str, download: bool) -> Splits:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigurationError(
            f"data.dataset={name!r}: give one of {', '.join(sorted(SOURCES))}, or a continuum data set's class path"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"data.dataset={name!r} cannot be imported: {error}") from error
    if not download and not os.path.isdir(root):
        # continuum creates the folder before it notices that nothing is there.
        raise DatasetNotFoundError(name, os.path.abspath(root), "the files of that data set", True)
    arrays: list[Any] = []
    for train in (True, False):
        try:
            split = cls(root, train=train, download=download)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise DataError(f"data set '{name}' in {os.path.abspath(root)} cannot be read: {error}") from error
        except TypeError as error:
            raise ConfigurationError(
                f"data.dataset={name!r} is no class that takes (path, train, download), as continuum's do: {error}"
            ) from error
        arrays += _read_continuum(split, name)
    return from_arrays(tuple(arrays))


def _read_continuum(split: Any, name: str) -> tuple[Any, Any]:
    try:
        x, y, _ = split.get_data()
    except (AttributeError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DataError(f"data set '{name}' cannot be read: {error}") from error
    if isinstance(x, np.ndarray) and x.dtype.kind in "OUS":
        return _read_images([os.fsdecode(path) for path in x]), y
    return x, y


def _read_images(paths: list[str]) -> np.ndarray:
    """Return ``(n, H, W, 3)`` uint8, all images in memory; grey and transparent ones become RGB."""
    from PIL import Image

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error}") from error
        if images[-1].shape != images[0].shape:
            sizes = " and ".join(f"{h}x{w}" for h, w, _ in (images[0].shape, images[-1].shape))
            raise DataError(f"images differ in size, {sizes} ({path}): resize them to one size first")
    return np.stack(images)


_CIFAR_STATS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_MNIST_FILES = tuple(
    f"MNIST/raw/{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
)

SOURCES: dict[str, Source] = {
    "digits": Source(10, InputSpec(1, 8, 8), _digits),
    "digits_dev": Source(10, InputSpec(1, 8, 8), _digits_dev),
    "synthetic": Source(10, InputSpec(3, 32, 32), _synthetic, (0.5,) * 3, (0.25,) * 3, augment=True),
    "mnist": Source(
        10,
        InputSpec(1, 28, 28),
        _continuum("MNIST", ""),
        (0.1307,),
        (0.3081,),
        files=_MNIST_FILES,
        downloadable=True,
    ),
    "cifar10": Source(
        10,
        InputSpec(3, 32, 32),
        _cifar(10, "CIFAR10"),
        *_CIFAR_STATS[10],
        augment=True,
        folder="CIFAR10",
        files=(*CIFAR_FILES[10][0], *CIFAR_FILES[10][1]),
        downloadable=True,
    ),
    "cifar100": Source(
        100,
        InputSpec(3, 32, 32),
        _cifar(100, "CIFAR100"),
        *_CIFAR_STATS[100],
        augment=True,
        folder="CIFAR100",
        files=(*CIFAR_FILES[100][0], *CIFAR_FILES[100][1]),
        downloadable=True,
    ),
}
